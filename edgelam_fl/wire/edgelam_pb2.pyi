from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KIND_UNSPECIFIED: _ClassVar[Kind]
    HELLO: _ClassVar[Kind]
    READY: _ClassVar[Kind]
    NOT_READY: _ClassVar[Kind]
    REFUSE: _ClassVar[Kind]
    TABLE: _ClassVar[Kind]
    TABLE_ALL: _ClassVar[Kind]
    ACT: _ClassVar[Kind]
    GRAD: _ClassVar[Kind]
    GRAD_END: _ClassVar[Kind]
    STEP_CLOSE: _ClassVar[Kind]
    STEP_READY: _ClassVar[Kind]
    STEP_APPLY: _ClassVar[Kind]
    DONE: _ClassVar[Kind]
    CANCEL: _ClassVar[Kind]
    PING: _ClassVar[Kind]
    PONG: _ClassVar[Kind]
    ERROR: _ClassVar[Kind]
    LABELS: _ClassVar[Kind]
    KV_STEP: _ClassVar[Kind]
    KV_DROP: _ClassVar[Kind]
    ACK: _ClassVar[Kind]
    BYE: _ClassVar[Kind]
    MISSING: _ClassVar[Kind]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    EVAL: _ClassVar[Phase]
    TRAIN: _ClassVar[Phase]

class LinkRole(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LINK_UNSPECIFIED: _ClassVar[LinkRole]
    ENTRY: _ClassVar[LinkRole]
    EXIT: _ClassVar[LinkRole]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    DEVICE: _ClassVar[Role]
    EDGE: _ClassVar[Role]
KIND_UNSPECIFIED: Kind
HELLO: Kind
READY: Kind
NOT_READY: Kind
REFUSE: Kind
TABLE: Kind
TABLE_ALL: Kind
ACT: Kind
GRAD: Kind
GRAD_END: Kind
STEP_CLOSE: Kind
STEP_READY: Kind
STEP_APPLY: Kind
DONE: Kind
CANCEL: Kind
PING: Kind
PONG: Kind
ERROR: Kind
LABELS: Kind
KV_STEP: Kind
KV_DROP: Kind
ACK: Kind
BYE: Kind
MISSING: Kind
PHASE_UNSPECIFIED: Phase
EVAL: Phase
TRAIN: Phase
LINK_UNSPECIFIED: LinkRole
ENTRY: LinkRole
EXIT: LinkRole
ROLE_UNSPECIFIED: Role
DEVICE: Role
EDGE: Role

class RawBytes(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "codec", "total_bytes", "chunk", "offset")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    total_bytes: int
    chunk: int
    offset: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., total_bytes: _Optional[int] = ..., chunk: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("kind", "optional", "last_chunk", "job_token", "phase", "step", "micro_batch", "device_index", "tensor", "send_ns", "row_lengths", "loss_sum", "sums", "ack", "positions", "row_names", "kept_rows", "segment_lengths", "hello", "ready", "not_ready", "refuse", "table", "table_all", "step_close", "done", "cancel", "error", "progress", "step_ready", "step_apply", "kv_step", "kv_drop")
    class SumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    OPTIONAL_FIELD_NUMBER: _ClassVar[int]
    LAST_CHUNK_FIELD_NUMBER: _ClassVar[int]
    JOB_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SEND_NS_FIELD_NUMBER: _ClassVar[int]
    ROW_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    ROW_NAMES_FIELD_NUMBER: _ClassVar[int]
    KEPT_ROWS_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    NOT_READY_FIELD_NUMBER: _ClassVar[int]
    REFUSE_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    TABLE_ALL_FIELD_NUMBER: _ClassVar[int]
    STEP_CLOSE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STEP_READY_FIELD_NUMBER: _ClassVar[int]
    STEP_APPLY_FIELD_NUMBER: _ClassVar[int]
    KV_STEP_FIELD_NUMBER: _ClassVar[int]
    KV_DROP_FIELD_NUMBER: _ClassVar[int]
    kind: Kind
    optional: bool
    last_chunk: bool
    job_token: int
    phase: Phase
    step: int
    micro_batch: int
    device_index: int
    tensor: Tensor
    send_ns: int
    row_lengths: _containers.RepeatedScalarFieldContainer[int]
    loss_sum: float
    sums: _containers.ScalarMap[str, float]
    ack: int
    positions: _containers.RepeatedScalarFieldContainer[int]
    row_names: _containers.RepeatedScalarFieldContainer[bytes]
    kept_rows: _containers.RepeatedScalarFieldContainer[int]
    segment_lengths: _containers.RepeatedScalarFieldContainer[int]
    hello: Hello
    ready: Ready
    not_ready: NotReady
    refuse: Refuse
    table: Table
    table_all: TableAll
    step_close: StepClose
    done: Done
    cancel: Cancel
    error: Error
    progress: Progress
    step_ready: StepReady
    step_apply: StepApply
    kv_step: KvStep
    kv_drop: KvDrop
    def __init__(self, kind: _Optional[_Union[Kind, str]] = ..., optional: _Optional[bool] = ..., last_chunk: _Optional[bool] = ..., job_token: _Optional[int] = ..., phase: _Optional[_Union[Phase, str]] = ..., step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., device_index: _Optional[int] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., send_ns: _Optional[int] = ..., row_lengths: _Optional[_Iterable[int]] = ..., loss_sum: _Optional[float] = ..., sums: _Optional[_Mapping[str, float]] = ..., ack: _Optional[int] = ..., positions: _Optional[_Iterable[int]] = ..., row_names: _Optional[_Iterable[bytes]] = ..., kept_rows: _Optional[_Iterable[int]] = ..., segment_lengths: _Optional[_Iterable[int]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., not_ready: _Optional[_Union[NotReady, _Mapping]] = ..., refuse: _Optional[_Union[Refuse, _Mapping]] = ..., table: _Optional[_Union[Table, _Mapping]] = ..., table_all: _Optional[_Union[TableAll, _Mapping]] = ..., step_close: _Optional[_Union[StepClose, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., step_ready: _Optional[_Union[StepReady, _Mapping]] = ..., step_apply: _Optional[_Union[StepApply, _Mapping]] = ..., kv_step: _Optional[_Union[KvStep, _Mapping]] = ..., kv_drop: _Optional[_Union[KvDrop, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("version", "job", "node", "device_index", "link", "route_token", "model_digest", "window", "codecs", "session", "resumes", "received")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    ROUTE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    RESUMES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    version: int
    job: str
    node: str
    device_index: int
    link: LinkRole
    route_token: bytes
    model_digest: str
    window: int
    codecs: _containers.RepeatedScalarFieldContainer[str]
    session: bytes
    resumes: bool
    received: int
    def __init__(self, version: _Optional[int] = ..., job: _Optional[str] = ..., node: _Optional[str] = ..., device_index: _Optional[int] = ..., link: _Optional[_Union[LinkRole, str]] = ..., route_token: _Optional[bytes] = ..., model_digest: _Optional[str] = ..., window: _Optional[int] = ..., codecs: _Optional[_Iterable[str]] = ..., session: _Optional[bytes] = ..., resumes: _Optional[bool] = ..., received: _Optional[int] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("version", "window", "job_token", "activation_codec", "gradient_codec", "received", "front_cache")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    JOB_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CODEC_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CODEC_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FRONT_CACHE_FIELD_NUMBER: _ClassVar[int]
    version: int
    window: int
    job_token: int
    activation_codec: str
    gradient_codec: str
    received: int
    front_cache: bytes
    def __init__(self, version: _Optional[int] = ..., window: _Optional[int] = ..., job_token: _Optional[int] = ..., activation_codec: _Optional[str] = ..., gradient_codec: _Optional[str] = ..., received: _Optional[int] = ..., front_cache: _Optional[bytes] = ...) -> None: ...

class NotReady(_message.Message):
    __slots__ = ("retry_ms",)
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    retry_ms: int
    def __init__(self, retry_ms: _Optional[int] = ...) -> None: ...

class Refuse(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class StepRow(_message.Message):
    __slots__ = ("labels", "rows", "tokens")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    labels: int
    rows: _containers.RepeatedScalarFieldContainer[int]
    tokens: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, labels: _Optional[int] = ..., rows: _Optional[_Iterable[int]] = ..., tokens: _Optional[_Iterable[int]] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[StepRow]
    def __init__(self, steps: _Optional[_Iterable[_Union[StepRow, _Mapping]]] = ...) -> None: ...

class StepTotal(_message.Message):
    __slots__ = ("labels", "members")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    labels: int
    members: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, labels: _Optional[int] = ..., members: _Optional[_Iterable[int]] = ...) -> None: ...

class TableAll(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[StepTotal]
    def __init__(self, steps: _Optional[_Iterable[_Union[StepTotal, _Mapping]]] = ...) -> None: ...

class StepClose(_message.Message):
    __slots__ = ("counted", "left_out", "labels_counted")
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    LABELS_COUNTED_FIELD_NUMBER: _ClassVar[int]
    counted: _containers.RepeatedScalarFieldContainer[int]
    left_out: _containers.RepeatedCompositeFieldContainer[LeftOut]
    labels_counted: int
    def __init__(self, counted: _Optional[_Iterable[int]] = ..., left_out: _Optional[_Iterable[_Union[LeftOut, _Mapping]]] = ..., labels_counted: _Optional[int] = ...) -> None: ...

class LeftOut(_message.Message):
    __slots__ = ("device_index", "reason")
    DEVICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    device_index: int
    reason: str
    def __init__(self, device_index: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class StepReady(_message.Message):
    __slots__ = ("squared_norm", "finite", "host")
    SQUARED_NORM_FIELD_NUMBER: _ClassVar[int]
    FINITE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    squared_norm: float
    finite: bool
    host: int
    def __init__(self, squared_norm: _Optional[float] = ..., finite: _Optional[bool] = ..., host: _Optional[int] = ...) -> None: ...

class StepApply(_message.Message):
    __slots__ = ("scale", "skip")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SKIP_FIELD_NUMBER: _ClassVar[int]
    scale: float
    skip: bool
    def __init__(self, scale: _Optional[float] = ..., skip: _Optional[bool] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("loss_sum", "labels")
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    loss_sum: float
    labels: int
    def __init__(self, loss_sum: _Optional[float] = ..., labels: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "scope", "text")
    CODE_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    code: str
    scope: str
    text: str
    def __init__(self, code: _Optional[str] = ..., scope: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("phase", "step")
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    phase: Phase
    step: int
    def __init__(self, phase: _Optional[_Union[Phase, str]] = ..., step: _Optional[int] = ...) -> None: ...

class KvStep(_message.Message):
    __slots__ = ("session", "position", "length")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    session: int
    position: int
    length: int
    def __init__(self, session: _Optional[int] = ..., position: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class KvDrop(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: int
    def __init__(self, session: _Optional[int] = ...) -> None: ...

class Hop(_message.Message):
    __slots__ = ("node", "first", "last", "address", "relay_tokens")
    class RelayTokensEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RELAY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    node: str
    first: int
    last: int
    address: str
    relay_tokens: _containers.ScalarMap[str, bytes]
    def __init__(self, node: _Optional[str] = ..., first: _Optional[int] = ..., last: _Optional[int] = ..., address: _Optional[str] = ..., relay_tokens: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("device", "device_index", "front", "back_first", "hops", "token", "share_bps")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_INDEX_FIELD_NUMBER: _ClassVar[int]
    FRONT_FIELD_NUMBER: _ClassVar[int]
    BACK_FIRST_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    SHARE_BPS_FIELD_NUMBER: _ClassVar[int]
    device: str
    device_index: int
    front: int
    back_first: int
    hops: _containers.RepeatedCompositeFieldContainer[Hop]
    token: bytes
    share_bps: float
    def __init__(self, device: _Optional[str] = ..., device_index: _Optional[int] = ..., front: _Optional[int] = ..., back_first: _Optional[int] = ..., hops: _Optional[_Iterable[_Union[Hop, _Mapping]]] = ..., token: _Optional[bytes] = ..., share_bps: _Optional[float] = ...) -> None: ...

class ModelRef(_message.Message):
    __slots__ = ("name", "digest", "base", "num_layers", "compute", "wire", "files", "weights_digest", "own_dropout")
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    WIRE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    OWN_DROPOUT_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    base: str
    num_layers: int
    compute: str
    wire: str
    files: _containers.ScalarMap[str, str]
    weights_digest: str
    own_dropout: bool
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., base: _Optional[str] = ..., num_layers: _Optional[int] = ..., compute: _Optional[str] = ..., wire: _Optional[str] = ..., files: _Optional[_Mapping[str, str]] = ..., weights_digest: _Optional[str] = ..., own_dropout: _Optional[bool] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "targets", "train_front", "train_hosts", "train_back", "dropout", "freeze_a", "freeze_b", "prox_mu", "layers", "rslora", "dora", "saved", "own")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_FRONT_FIELD_NUMBER: _ClassVar[int]
    TRAIN_HOSTS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_BACK_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    FREEZE_A_FIELD_NUMBER: _ClassVar[int]
    FREEZE_B_FIELD_NUMBER: _ClassVar[int]
    PROX_MU_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    DORA_FIELD_NUMBER: _ClassVar[int]
    SAVED_FIELD_NUMBER: _ClassVar[int]
    OWN_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    train_front: bool
    train_hosts: bool
    train_back: bool
    dropout: float
    freeze_a: bool
    freeze_b: bool
    prox_mu: float
    layers: _containers.RepeatedScalarFieldContainer[int]
    rslora: bool
    dora: bool
    saved: _containers.RepeatedScalarFieldContainer[str]
    own: _containers.RepeatedCompositeFieldContainer[OwnTerms]
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., train_front: _Optional[bool] = ..., train_hosts: _Optional[bool] = ..., train_back: _Optional[bool] = ..., dropout: _Optional[float] = ..., freeze_a: _Optional[bool] = ..., freeze_b: _Optional[bool] = ..., prox_mu: _Optional[float] = ..., layers: _Optional[_Iterable[int]] = ..., rslora: _Optional[bool] = ..., dora: _Optional[bool] = ..., saved: _Optional[_Iterable[str]] = ..., own: _Optional[_Iterable[_Union[OwnTerms, _Mapping]]] = ...) -> None: ...

class OwnTerms(_message.Message):
    __slots__ = ("modules", "rank", "alpha")
    MODULES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    modules: _containers.RepeatedScalarFieldContainer[str]
    rank: int
    alpha: float
    def __init__(self, modules: _Optional[_Iterable[str]] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ...) -> None: ...

class Optimizer(_message.Message):
    __slots__ = ("name", "step_offset", "lrs", "clip", "max_norm", "keep", "weight_decay", "betas", "eps", "momentum")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEP_OFFSET_FIELD_NUMBER: _ClassVar[int]
    LRS_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    MAX_NORM_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    BETAS_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    name: str
    step_offset: int
    lrs: _containers.RepeatedScalarFieldContainer[float]
    clip: str
    max_norm: float
    keep: str
    weight_decay: float
    betas: _containers.RepeatedScalarFieldContainer[float]
    eps: float
    momentum: float
    def __init__(self, name: _Optional[str] = ..., step_offset: _Optional[int] = ..., lrs: _Optional[_Iterable[float]] = ..., clip: _Optional[str] = ..., max_norm: _Optional[float] = ..., keep: _Optional[str] = ..., weight_decay: _Optional[float] = ..., betas: _Optional[_Iterable[float]] = ..., eps: _Optional[float] = ..., momentum: _Optional[float] = ...) -> None: ...

class TaskSettings(_message.Message):
    __slots__ = ("kind", "max_tokens", "template", "loss_on", "prompt_field", "answer_field", "held_out", "classes", "weighting", "too_long", "bad_lines", "more_prompt_fields", "label_smoothing", "evaluate_examples", "packing", "metrics", "metrics_examples", "metrics_tokens", "radio", "private_modules")
    KIND_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    LOSS_ON_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTING_FIELD_NUMBER: _ClassVar[int]
    TOO_LONG_FIELD_NUMBER: _ClassVar[int]
    BAD_LINES_FIELD_NUMBER: _ClassVar[int]
    MORE_PROMPT_FIELDS_FIELD_NUMBER: _ClassVar[int]
    LABEL_SMOOTHING_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    PACKING_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    METRICS_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    METRICS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RADIO_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_MODULES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    max_tokens: int
    template: str
    loss_on: str
    prompt_field: str
    answer_field: str
    held_out: float
    classes: _containers.RepeatedScalarFieldContainer[str]
    weighting: str
    too_long: str
    bad_lines: str
    more_prompt_fields: _containers.RepeatedScalarFieldContainer[str]
    label_smoothing: float
    evaluate_examples: int
    packing: bool
    metrics: _containers.RepeatedScalarFieldContainer[str]
    metrics_examples: int
    metrics_tokens: int
    radio: Radio
    private_modules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, kind: _Optional[str] = ..., max_tokens: _Optional[int] = ..., template: _Optional[str] = ..., loss_on: _Optional[str] = ..., prompt_field: _Optional[str] = ..., answer_field: _Optional[str] = ..., held_out: _Optional[float] = ..., classes: _Optional[_Iterable[str]] = ..., weighting: _Optional[str] = ..., too_long: _Optional[str] = ..., bad_lines: _Optional[str] = ..., more_prompt_fields: _Optional[_Iterable[str]] = ..., label_smoothing: _Optional[float] = ..., evaluate_examples: _Optional[int] = ..., packing: _Optional[bool] = ..., metrics: _Optional[_Iterable[str]] = ..., metrics_examples: _Optional[int] = ..., metrics_tokens: _Optional[int] = ..., radio: _Optional[_Union[Radio, _Mapping]] = ..., private_modules: _Optional[_Iterable[str]] = ...) -> None: ...

class Radio(_message.Message):
    __slots__ = ("snr_db", "history_slots", "future_slots", "series", "duplex", "seed", "beam_snrs_db", "base", "pilot_snrs_db")
    SNR_DB_FIELD_NUMBER: _ClassVar[int]
    HISTORY_SLOTS_FIELD_NUMBER: _ClassVar[int]
    FUTURE_SLOTS_FIELD_NUMBER: _ClassVar[int]
    SERIES_FIELD_NUMBER: _ClassVar[int]
    DUPLEX_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BEAM_SNRS_DB_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    PILOT_SNRS_DB_FIELD_NUMBER: _ClassVar[int]
    snr_db: float
    history_slots: int
    future_slots: int
    series: int
    duplex: str
    seed: int
    beam_snrs_db: _containers.RepeatedScalarFieldContainer[float]
    base: str
    pilot_snrs_db: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, snr_db: _Optional[float] = ..., history_slots: _Optional[int] = ..., future_slots: _Optional[int] = ..., series: _Optional[int] = ..., duplex: _Optional[str] = ..., seed: _Optional[int] = ..., beam_snrs_db: _Optional[_Iterable[float]] = ..., base: _Optional[str] = ..., pilot_snrs_db: _Optional[_Iterable[float]] = ...) -> None: ...

class Deadlines(_message.Message):
    __slots__ = ("ready_s", "step_s", "round_s", "silent_s", "reconnect_s")
    READY_S_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_S_FIELD_NUMBER: _ClassVar[int]
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    RECONNECT_S_FIELD_NUMBER: _ClassVar[int]
    ready_s: float
    step_s: float
    round_s: float
    silent_s: float
    reconnect_s: float
    def __init__(self, ready_s: _Optional[float] = ..., step_s: _Optional[float] = ..., round_s: _Optional[float] = ..., silent_s: _Optional[float] = ..., reconnect_s: _Optional[float] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("run", "round", "attempt", "node", "role", "routes", "model", "lora", "optimizer", "task", "host_mode", "evaluate", "steps", "batch_size", "micro_batches", "window", "min_devices", "deadlines", "seed", "adapter_digest", "protocol_version", "serves", "hosted", "site", "labels", "checkpointing", "own_steps", "cursor", "generate", "hub_port", "relay_token", "slices_token", "gradient_factor", "cut", "lowrank", "corrections", "alone", "privacy", "first_step", "resume_attempt", "snapshot_every", "kept_token", "kept_every", "front_cache_bytes", "attend_token", "activation_codec", "gradient_codec")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    HOST_MODE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCHES_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    MIN_DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEADLINES_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    SERVES_FIELD_NUMBER: _ClassVar[int]
    HOSTED_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINTING_FIELD_NUMBER: _ClassVar[int]
    OWN_STEPS_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    GENERATE_FIELD_NUMBER: _ClassVar[int]
    HUB_PORT_FIELD_NUMBER: _ClassVar[int]
    RELAY_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SLICES_TOKEN_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FACTOR_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    LOWRANK_FIELD_NUMBER: _ClassVar[int]
    CORRECTIONS_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    PRIVACY_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    RESUME_ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_EVERY_FIELD_NUMBER: _ClassVar[int]
    KEPT_TOKEN_FIELD_NUMBER: _ClassVar[int]
    KEPT_EVERY_FIELD_NUMBER: _ClassVar[int]
    FRONT_CACHE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ATTEND_TOKEN_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_CODEC_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_CODEC_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    node: str
    role: Role
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    model: ModelRef
    lora: Lora
    optimizer: Optimizer
    task: TaskSettings
    host_mode: str
    evaluate: bool
    steps: int
    batch_size: int
    micro_batches: int
    window: int
    min_devices: int
    deadlines: Deadlines
    seed: int
    adapter_digest: str
    protocol_version: int
    serves: _containers.RepeatedCompositeFieldContainer[Route]
    hosted: Slice
    site: str
    labels: str
    checkpointing: bool
    own_steps: int
    cursor: int
    generate: bool
    hub_port: int
    relay_token: bytes
    slices_token: bytes
    gradient_factor: float
    cut: Cut
    lowrank: LowRank
    corrections: _containers.RepeatedCompositeFieldContainer[Correction]
    alone: bool
    privacy: Privacy
    first_step: int
    resume_attempt: int
    snapshot_every: int
    kept_token: bytes
    kept_every: int
    front_cache_bytes: int
    attend_token: bytes
    activation_codec: str
    gradient_codec: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., node: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ..., model: _Optional[_Union[ModelRef, _Mapping]] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., optimizer: _Optional[_Union[Optimizer, _Mapping]] = ..., task: _Optional[_Union[TaskSettings, _Mapping]] = ..., host_mode: _Optional[str] = ..., evaluate: _Optional[bool] = ..., steps: _Optional[int] = ..., batch_size: _Optional[int] = ..., micro_batches: _Optional[int] = ..., window: _Optional[int] = ..., min_devices: _Optional[int] = ..., deadlines: _Optional[_Union[Deadlines, _Mapping]] = ..., seed: _Optional[int] = ..., adapter_digest: _Optional[str] = ..., protocol_version: _Optional[int] = ..., serves: _Optional[_Iterable[_Union[Route, _Mapping]]] = ..., hosted: _Optional[_Union[Slice, _Mapping]] = ..., site: _Optional[str] = ..., labels: _Optional[str] = ..., checkpointing: _Optional[bool] = ..., own_steps: _Optional[int] = ..., cursor: _Optional[int] = ..., generate: _Optional[bool] = ..., hub_port: _Optional[int] = ..., relay_token: _Optional[bytes] = ..., slices_token: _Optional[bytes] = ..., gradient_factor: _Optional[float] = ..., cut: _Optional[_Union[Cut, _Mapping]] = ..., lowrank: _Optional[_Union[LowRank, _Mapping]] = ..., corrections: _Optional[_Iterable[_Union[Correction, _Mapping]]] = ..., alone: _Optional[bool] = ..., privacy: _Optional[_Union[Privacy, _Mapping]] = ..., first_step: _Optional[int] = ..., resume_attempt: _Optional[int] = ..., snapshot_every: _Optional[int] = ..., kept_token: _Optional[bytes] = ..., kept_every: _Optional[int] = ..., front_cache_bytes: _Optional[int] = ..., attend_token: _Optional[bytes] = ..., activation_codec: _Optional[str] = ..., gradient_codec: _Optional[str] = ...) -> None: ...

class Privacy(_message.Message):
    __slots__ = ("update_clip", "update_noise", "step_clip", "step_noise", "step_devices")
    UPDATE_CLIP_FIELD_NUMBER: _ClassVar[int]
    UPDATE_NOISE_FIELD_NUMBER: _ClassVar[int]
    STEP_CLIP_FIELD_NUMBER: _ClassVar[int]
    STEP_NOISE_FIELD_NUMBER: _ClassVar[int]
    STEP_DEVICES_FIELD_NUMBER: _ClassVar[int]
    update_clip: float
    update_noise: float
    step_clip: float
    step_noise: float
    step_devices: float
    def __init__(self, update_clip: _Optional[float] = ..., update_noise: _Optional[float] = ..., step_clip: _Optional[float] = ..., step_noise: _Optional[float] = ..., step_devices: _Optional[float] = ...) -> None: ...

class Cut(_message.Message):
    __slots__ = ("clip", "noise", "private_front", "disguise")
    CLIP_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FRONT_FIELD_NUMBER: _ClassVar[int]
    DISGUISE_FIELD_NUMBER: _ClassVar[int]
    clip: float
    noise: float
    private_front: bool
    disguise: float
    def __init__(self, clip: _Optional[float] = ..., noise: _Optional[float] = ..., private_front: _Optional[bool] = ..., disguise: _Optional[float] = ...) -> None: ...

class LowRank(_message.Message):
    __slots__ = ("layer", "rank")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    layer: int
    rank: int
    def __init__(self, layer: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Correction(_message.Message):
    __slots__ = ("scope", "source", "digest")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    scope: str
    source: str
    digest: str
    def __init__(self, scope: _Optional[str] = ..., source: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("first", "last")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first: int
    last: int
    def __init__(self, first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class ProfileRequest(_message.Message):
    __slots__ = ("protocol_version", "task", "measure_model", "model_digest", "hub_port", "slices_token", "measure_layers", "measure_link", "model")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    MEASURE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    HUB_PORT_FIELD_NUMBER: _ClassVar[int]
    SLICES_TOKEN_FIELD_NUMBER: _ClassVar[int]
    MEASURE_LAYERS_FIELD_NUMBER: _ClassVar[int]
    MEASURE_LINK_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    task: TaskSettings
    measure_model: str
    model_digest: str
    hub_port: int
    slices_token: bytes
    measure_layers: str
    measure_link: bool
    model: str
    def __init__(self, protocol_version: _Optional[int] = ..., task: _Optional[_Union[TaskSettings, _Mapping]] = ..., measure_model: _Optional[str] = ..., model_digest: _Optional[str] = ..., hub_port: _Optional[int] = ..., slices_token: _Optional[bytes] = ..., measure_layers: _Optional[str] = ..., measure_link: _Optional[bool] = ..., model: _Optional[str] = ...) -> None: ...

class DataCounts(_message.Message):
    __slots__ = ("bad", "skipped", "cut", "unread", "unmeasured", "cut_answers")
    BAD_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    UNREAD_FIELD_NUMBER: _ClassVar[int]
    UNMEASURED_FIELD_NUMBER: _ClassVar[int]
    CUT_ANSWERS_FIELD_NUMBER: _ClassVar[int]
    bad: int
    skipped: int
    cut: int
    unread: int
    unmeasured: int
    cut_answers: int
    def __init__(self, bad: _Optional[int] = ..., skipped: _Optional[int] = ..., cut: _Optional[int] = ..., unread: _Optional[int] = ..., unmeasured: _Optional[int] = ..., cut_answers: _Optional[int] = ...) -> None: ...

class LayerTime(_message.Message):
    __slots__ = ("tokens", "seconds")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    seconds: _containers.ScalarMap[str, float]
    def __init__(self, tokens: _Optional[int] = ..., seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("protocol_version", "name", "role", "address", "memory_available_bytes", "cpu_threads", "bases", "codecs", "examples", "held_out", "problem", "versions", "base_seconds", "tags", "trust", "link_up_bps", "link_down_bps", "round_trip_s", "disk_free_bytes", "layer_times", "disk_write_bytes_per_s", "idle_bytes", "code", "data", "chip")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class BaseSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_THREADS_FIELD_NUMBER: _ClassVar[int]
    BASES_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    TRUST_FIELD_NUMBER: _ClassVar[int]
    LINK_UP_BPS_FIELD_NUMBER: _ClassVar[int]
    LINK_DOWN_BPS_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    DISK_FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LAYER_TIMES_FIELD_NUMBER: _ClassVar[int]
    DISK_WRITE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    IDLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHIP_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    name: str
    role: Role
    address: str
    memory_available_bytes: int
    cpu_threads: int
    bases: _containers.RepeatedScalarFieldContainer[str]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    examples: int
    held_out: int
    problem: str
    versions: _containers.ScalarMap[str, str]
    base_seconds: _containers.ScalarMap[str, float]
    tags: _containers.RepeatedScalarFieldContainer[str]
    trust: str
    link_up_bps: float
    link_down_bps: float
    round_trip_s: float
    disk_free_bytes: int
    layer_times: _containers.RepeatedCompositeFieldContainer[LayerTime]
    disk_write_bytes_per_s: float
    idle_bytes: int
    code: str
    data: DataCounts
    chip: str
    def __init__(self, protocol_version: _Optional[int] = ..., name: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., memory_available_bytes: _Optional[int] = ..., cpu_threads: _Optional[int] = ..., bases: _Optional[_Iterable[str]] = ..., codecs: _Optional[_Iterable[str]] = ..., examples: _Optional[int] = ..., held_out: _Optional[int] = ..., problem: _Optional[str] = ..., versions: _Optional[_Mapping[str, str]] = ..., base_seconds: _Optional[_Mapping[str, float]] = ..., tags: _Optional[_Iterable[str]] = ..., trust: _Optional[str] = ..., link_up_bps: _Optional[float] = ..., link_down_bps: _Optional[float] = ..., round_trip_s: _Optional[float] = ..., disk_free_bytes: _Optional[int] = ..., layer_times: _Optional[_Iterable[_Union[LayerTime, _Mapping]]] = ..., disk_write_bytes_per_s: _Optional[float] = ..., idle_bytes: _Optional[int] = ..., code: _Optional[str] = ..., data: _Optional[_Union[DataCounts, _Mapping]] = ..., chip: _Optional[str] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("plan", "adapter", "corrections", "snapshot")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CORRECTIONS_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    adapter: bytes
    corrections: _containers.RepeatedScalarFieldContainer[bytes]
    snapshot: bytes
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., adapter: _Optional[bytes] = ..., corrections: _Optional[_Iterable[bytes]] = ..., snapshot: _Optional[bytes] = ...) -> None: ...

class SubmitReply(_message.Message):
    __slots__ = ("accepted", "reason", "code")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reason: str
    code: str
    def __init__(self, accepted: _Optional[bool] = ..., reason: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("job", "timeout_s")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    job: str
    timeout_s: float
    def __init__(self, job: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class KindBytes(_message.Message):
    __slots__ = ("link", "direction", "kind", "payload_bytes", "framing_bytes", "messages")
    LINK_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    FRAMING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    link: str
    direction: str
    kind: str
    payload_bytes: int
    framing_bytes: int
    messages: int
    def __init__(self, link: _Optional[str] = ..., direction: _Optional[str] = ..., kind: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., framing_bytes: _Optional[int] = ..., messages: _Optional[int] = ...) -> None: ...

class StepReport(_message.Message):
    __slots__ = ("step", "loss_sum", "labels", "seconds", "counted", "reason")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss_sum: float
    labels: int
    seconds: float
    counted: bool
    reason: str
    def __init__(self, step: _Optional[int] = ..., loss_sum: _Optional[float] = ..., labels: _Optional[int] = ..., seconds: _Optional[float] = ..., counted: _Optional[bool] = ..., reason: _Optional[str] = ...) -> None: ...

class JobReport(_message.Message):
    __slots__ = ("job", "node", "role", "state", "error", "adapter_digest", "labels_trained", "eval_loss_sum", "eval_labels", "steps", "bytes", "tokens_trained", "train_seconds", "eval_seconds", "compute_seconds", "peak_rss_bytes", "examples", "moments", "contributions", "host", "eval_sums", "update_clipped", "timeline", "code", "held_out", "data", "snapshots", "held", "celsius", "slowed")
    class EvalSumsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class HeldEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABELS_TRAINED_FIELD_NUMBER: _ClassVar[int]
    EVAL_LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    EVAL_LABELS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TRAINED_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EVAL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MOMENTS_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    EVAL_SUMS_FIELD_NUMBER: _ClassVar[int]
    UPDATE_CLIPPED_FIELD_NUMBER: _ClassVar[int]
    TIMELINE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    CELSIUS_FIELD_NUMBER: _ClassVar[int]
    SLOWED_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    role: Role
    state: str
    error: str
    adapter_digest: str
    labels_trained: int
    eval_loss_sum: float
    eval_labels: int
    steps: _containers.RepeatedCompositeFieldContainer[StepReport]
    bytes: _containers.RepeatedCompositeFieldContainer[KindBytes]
    tokens_trained: int
    train_seconds: float
    eval_seconds: float
    compute_seconds: float
    peak_rss_bytes: int
    examples: int
    moments: str
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    host: HostPart
    eval_sums: _containers.ScalarMap[str, float]
    update_clipped: bool
    timeline: _containers.RepeatedCompositeFieldContainer[Interval]
    code: str
    held_out: int
    data: DataCounts
    snapshots: _containers.RepeatedCompositeFieldContainer[StepSnapshot]
    held: _containers.ScalarMap[str, bytes]
    celsius: float
    slowed: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., state: _Optional[str] = ..., error: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., labels_trained: _Optional[int] = ..., eval_loss_sum: _Optional[float] = ..., eval_labels: _Optional[int] = ..., steps: _Optional[_Iterable[_Union[StepReport, _Mapping]]] = ..., bytes: _Optional[_Iterable[_Union[KindBytes, _Mapping]]] = ..., tokens_trained: _Optional[int] = ..., train_seconds: _Optional[float] = ..., eval_seconds: _Optional[float] = ..., compute_seconds: _Optional[float] = ..., peak_rss_bytes: _Optional[int] = ..., examples: _Optional[int] = ..., moments: _Optional[str] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., host: _Optional[_Union[HostPart, _Mapping]] = ..., eval_sums: _Optional[_Mapping[str, float]] = ..., update_clipped: _Optional[bool] = ..., timeline: _Optional[_Iterable[_Union[Interval, _Mapping]]] = ..., code: _Optional[str] = ..., held_out: _Optional[int] = ..., data: _Optional[_Union[DataCounts, _Mapping]] = ..., snapshots: _Optional[_Iterable[_Union[StepSnapshot, _Mapping]]] = ..., held: _Optional[_Mapping[str, bytes]] = ..., celsius: _Optional[float] = ..., slowed: _Optional[str] = ...) -> None: ...

class StepSnapshot(_message.Message):
    __slots__ = ("attempt", "steps")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    steps: int
    def __init__(self, attempt: _Optional[int] = ..., steps: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("scope", "source", "weight", "adapter", "lr_sum")
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    LR_SUM_FIELD_NUMBER: _ClassVar[int]
    scope: str
    source: str
    weight: float
    adapter: bytes
    lr_sum: float
    def __init__(self, scope: _Optional[str] = ..., source: _Optional[str] = ..., weight: _Optional[float] = ..., adapter: _Optional[bytes] = ..., lr_sum: _Optional[float] = ...) -> None: ...

class HostPart(_message.Message):
    __slots__ = ("first_layer", "last_layer", "compute_seconds", "bytes", "labels_trained", "left_out", "gradients", "gradients_clipped")
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    LAST_LAYER_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    LABELS_TRAINED_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_CLIPPED_FIELD_NUMBER: _ClassVar[int]
    first_layer: int
    last_layer: int
    compute_seconds: float
    bytes: _containers.RepeatedCompositeFieldContainer[KindBytes]
    labels_trained: int
    left_out: _containers.RepeatedCompositeFieldContainer[DeviceLeftOut]
    gradients: int
    gradients_clipped: int
    def __init__(self, first_layer: _Optional[int] = ..., last_layer: _Optional[int] = ..., compute_seconds: _Optional[float] = ..., bytes: _Optional[_Iterable[_Union[KindBytes, _Mapping]]] = ..., labels_trained: _Optional[int] = ..., left_out: _Optional[_Iterable[_Union[DeviceLeftOut, _Mapping]]] = ..., gradients: _Optional[int] = ..., gradients_clipped: _Optional[int] = ...) -> None: ...

class DeviceLeftOut(_message.Message):
    __slots__ = ("device", "steps", "reason", "out", "was_counted")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    WAS_COUNTED_FIELD_NUMBER: _ClassVar[int]
    device: str
    steps: int
    reason: str
    out: bool
    was_counted: bool
    def __init__(self, device: _Optional[str] = ..., steps: _Optional[int] = ..., reason: _Optional[str] = ..., out: _Optional[bool] = ..., was_counted: _Optional[bool] = ...) -> None: ...

class Interval(_message.Message):
    __slots__ = ("kind", "start_s", "seconds", "step", "micro_batch", "role", "peer", "tensor_bytes")
    KIND_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MICRO_BATCH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    start_s: float
    seconds: float
    step: int
    micro_batch: int
    role: str
    peer: str
    tensor_bytes: int
    def __init__(self, kind: _Optional[str] = ..., start_s: _Optional[float] = ..., seconds: _Optional[float] = ..., step: _Optional[int] = ..., micro_batch: _Optional[int] = ..., role: _Optional[str] = ..., peer: _Optional[str] = ..., tensor_bytes: _Optional[int] = ...) -> None: ...

class Dialler(_message.Message):
    __slots__ = ("number", "node", "serial")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    number: bytes
    node: str
    serial: str
    def __init__(self, number: _Optional[bytes] = ..., node: _Optional[str] = ..., serial: _Optional[str] = ...) -> None: ...

class RelayPass(_message.Message):
    __slots__ = ("part", "node", "links")
    PART_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    part: str
    node: str
    links: int
    def __init__(self, part: _Optional[str] = ..., node: _Optional[str] = ..., links: _Optional[int] = ...) -> None: ...

class EndedMembers(_message.Message):
    __slots__ = ("serials", "names")
    SERIALS_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    serials: _containers.RepeatedScalarFieldContainer[str]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, serials: _Optional[_Iterable[str]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("epoch", "state", "step", "progress")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    state: str
    step: int
    progress: NodeProgress
    def __init__(self, epoch: _Optional[int] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., progress: _Optional[_Union[NodeProgress, _Mapping]] = ...) -> None: ...

class NodeProgress(_message.Message):
    __slots__ = ("doing", "step", "steps", "unit", "units", "loss", "tokens", "bytes", "of_bytes")
    DOING_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    UNITS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    OF_BYTES_FIELD_NUMBER: _ClassVar[int]
    doing: str
    step: int
    steps: int
    unit: int
    units: int
    loss: float
    tokens: int
    bytes: int
    of_bytes: int
    def __init__(self, doing: _Optional[str] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., unit: _Optional[int] = ..., units: _Optional[int] = ..., loss: _Optional[float] = ..., tokens: _Optional[int] = ..., bytes: _Optional[int] = ..., of_bytes: _Optional[int] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("cancelled", "out")
    class OutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    cancelled: str
    out: _containers.ScalarMap[str, str]
    def __init__(self, cancelled: _Optional[str] = ..., out: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LookRequest(_message.Message):
    __slots__ = ("job", "cancelled", "out")
    class OutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    OUT_FIELD_NUMBER: _ClassVar[int]
    job: str
    cancelled: str
    out: _containers.ScalarMap[str, str]
    def __init__(self, job: _Optional[str] = ..., cancelled: _Optional[str] = ..., out: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LookReply(_message.Message):
    __slots__ = ("nodes",)
    class NodesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Attendee
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Attendee, _Mapping]] = ...) -> None: ...
    NODES_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.MessageMap[str, Attendee]
    def __init__(self, nodes: _Optional[_Mapping[str, Attendee]] = ...) -> None: ...

class Attendee(_message.Message):
    __slots__ = ("silent_s", "epoch", "restarted", "state", "step", "progress")
    SILENT_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RESTARTED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    silent_s: float
    epoch: int
    restarted: bool
    state: str
    step: int
    progress: NodeProgress
    def __init__(self, silent_s: _Optional[float] = ..., epoch: _Optional[int] = ..., restarted: _Optional[bool] = ..., state: _Optional[str] = ..., step: _Optional[int] = ..., progress: _Optional[_Union[NodeProgress, _Mapping]] = ...) -> None: ...

class KeptPiece(_message.Message):
    __slots__ = ("source", "first_step", "last_step", "data")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    source: str
    first_step: int
    last_step: int
    data: bytes
    def __init__(self, source: _Optional[str] = ..., first_step: _Optional[int] = ..., last_step: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class KeptStates(_message.Message):
    __slots__ = ("states",)
    class StatesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.ScalarMap[str, bytes]
    def __init__(self, states: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class SliceRequest(_message.Message):
    __slots__ = ("model_digest", "base", "compute", "parts")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    base: str
    compute: str
    parts: _containers.RepeatedCompositeFieldContainer[SlicePart]
    def __init__(self, model_digest: _Optional[str] = ..., base: _Optional[str] = ..., compute: _Optional[str] = ..., parts: _Optional[_Iterable[_Union[SlicePart, _Mapping]]] = ...) -> None: ...

class SlicePart(_message.Message):
    __slots__ = ("name", "offset", "file")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    file: bool
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., file: _Optional[bool] = ...) -> None: ...

class SliceModel(_message.Message):
    __slots__ = ("model_digest", "files", "tensors", "identity", "weights_digest")
    class IdentityEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    files: _containers.RepeatedCompositeFieldContainer[SliceFile]
    tensors: _containers.RepeatedCompositeFieldContainer[SliceEntry]
    identity: _containers.ScalarMap[str, str]
    weights_digest: str
    def __init__(self, model_digest: _Optional[str] = ..., files: _Optional[_Iterable[_Union[SliceFile, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[SliceEntry, _Mapping]]] = ..., identity: _Optional[_Mapping[str, str]] = ..., weights_digest: _Optional[str] = ...) -> None: ...

class SliceFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class SliceEntry(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class SliceTensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...
