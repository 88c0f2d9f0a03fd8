"""Makes a tokenizer of the vocabulary in a GGUF file, and says which tokens end an answer. Knows no weights and no torch.

Both kinds are built here, and not by transformers' reader. For a byte-level vocabulary ("gpt2") tokenizer.ggml.pre says how text is cut
into words before merging: that reader cuts as GPT-2 for names that it does not know, and spells special tokens outside of the
byte alphabet anew. For SentencePiece ("llama") it leaves tokenizer.ggml.add_space_prefix unread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from edgelam_fl.errors import ModelError
from edgelam_fl.model.gguf_config import refusal

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_DIGIT = r"\p{N}"
_SPACE = "\u2581"  # stands for a space in SentencePiece


class _Cut(NamedTuple):
    """How text is cut into words: by one expression after the other, whose matches stand alone."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whether merges lead to it or not
    add_bos: bool = False  # if no key says


_LLAMA3 = _Cut((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_TAIL}",), ignore_merges=True, add_bos=True)
_DIGITS = _Cut((_DIGIT, _GPT2))
_PLAIN = _Cut((_GPT2,))
_QWEN2 = _Cut((rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_TAIL}",))
_TEKKEN = _Cut(
    (rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}",),
    ignore_merges=True,
    add_bos=True,
)
CUTS = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Cut(_LLAMA3.expressions)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), _PLAIN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
    "tekken": _TEKKEN,
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # values of tokenizer.ggml.token_type
_IDS = {  # key -> what transformers calls the token
    "bos_token_id": "bos_token", "eos_token_id": "eos_token", "unknown_token_id": "unk_token", "padding_token_id": "pad_token",
    "seperator_token_id": "sep_token", "cls_token_id": "cls_token", "mask_token_id": "mask_token",
}  # fmt: skip
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Older files have no eot_token_id, or the end of a text as eos_token_id: llama.cpp ends at tokens with these spellings too.
_END_SPELLINGS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
})  # fmt: skip
_FLAGS = ("add_bos_token", "add_eos_token", "add_space_prefix")
_UNDERSTOOD = {
    "model", "pre", "tokens", "scores", "token_type", "merges", "suppress_tokens", *_FLAGS, *_IDS, *_ENDS,
}  # fmt: skip
_HARMLESS = {  # keys after tokenizer. -> why they may be left unread
    "ggml.prefix_token_id": "for filling gaps in code, which is not done here",
    "ggml.suffix_token_id": "for filling gaps in code, which is not done here",
    "ggml.middle_token_id": "for filling gaps in code, which is not done here",
    "ggml.fim_pre_token_id": "for filling gaps in code, which is not done here",
    "ggml.fim_suf_token_id": "for filling gaps in code, which is not done here",
    "ggml.fim_mid_token_id": "for filling gaps in code, which is not done here",
    "ggml.fim_pad_token_id": "for filling gaps in code, which is not done here",
    "ggml.fim_rep_token_id": "for filling gaps in code, which is not done here",
    "ggml.fim_sep_token_id": "for filling gaps in code, which is not done here",
    "ggml.token_type_count": "for models that compare two texts",
    "chat_template": "used below",
    "chat_templates": "names of the templates, which stand in keys of their own",
    "huggingface.json": "the same tokenizer in another format",
}


class Vocabulary:
    """The tokenizer.* keys of one file, checked."""

    def __init__(self, keys: Mapping[str, Any], architecture: str, place: str) -> None:
        self._architecture, self._place = architecture, place
        self._ggml = {
            name.removeprefix("tokenizer.ggml."): v for name, v in keys.items() if name.startswith("tokenizer.ggml.")
        }
        self._templates = {
            name.removeprefix("tokenizer.chat_template").removeprefix(".") or "default": template
            for name, template in keys.items()
            if name == "tokenizer.chat_template" or name.startswith("tokenizer.chat_template.")
        }
        self._check_keys(keys)
        self._check_types()
        self.tokens: list[str] = self._ggml.get("tokens") or []
        if not self.tokens:
            raise ModelError(
                f"{place} has no vocabulary (tokenizer.ggml.tokens). Set model.name to the model's safetensors folder"
            )
        if len(set(self.tokens)) != len(self.tokens):
            raise ModelError(f"{place}: tokenizer.ggml.tokens has a token twice. Convert the model again")
        self._types: list[int] = self._ggml.get("token_type") or [NORMAL] * len(self.tokens)
        for name in ("token_type", "scores"):
            if name in self._ggml and len(self._ggml[name]) != len(self.tokens):
                raise ModelError(
                    f"{place}: tokenizer.ggml.{name} has {len(self._ggml[name])} values for {len(self.tokens)} tokens. Convert the model again"
                )
        for name in (*_IDS, *_ENDS):
            if name in self._ggml and not 0 <= self._ggml[name] < len(self.tokens):
                raise ModelError(
                    f"{place}: tokenizer.ggml.{name} = {self._ggml[name]} must be below the {len(self.tokens)} tokens. Convert the model again"
                )

    def _check_types(self) -> None:
        """Raises ModelError for a key whose value is of another kind than its name says."""
        lists = {"tokens": str, "merges": str, "scores": int | float, "token_type": int, "suppress_tokens": int}
        kinds = {**dict.fromkeys((*_IDS, *_ENDS), int), **dict.fromkeys(_FLAGS, bool), "model": str, "pre": str}
        for name, value in self._ggml.items():
            right = isinstance(value, kinds.get(name, object))
            if name in lists:
                right = isinstance(value, list) and all(isinstance(each, lists[name]) for each in value)
            if not right:
                raise ModelError(
                    f"{self._place}: tokenizer.ggml.{name} = {str(value)[:60]} is of another kind than it must be. Convert the model again"
                )
        for name, template in self._templates.items():
            if not isinstance(template, str):
                raise ModelError(f"{self._place}: the chat template {name} is no text. Convert the model again")

    def _check_keys(self, keys: Mapping[str, Any]) -> None:
        for key, value in keys.items():
            name = key.removeprefix("tokenizer.")
            if name == key or name in _HARMLESS or name.startswith("chat_template."):
                continue
            if name == "ggml.add_sep_token" and value is False:
                continue  # between two texts that are compared; llama.cpp's converter says so of most vocabularies
            if name.removeprefix("ggml.") not in _UNDERSTOOD:
                raise refusal(key, value, self._place)

    @property
    def special_ids(self) -> dict[str, int | None]:
        """Returns the ids of a config's special tokens, None for those that the file does not name: configs have defaults."""
        return {
            "bos_token_id": self._ggml.get("bos_token_id"),
            "eos_token_id": self._ggml.get("eos_token_id"),
            "pad_token_id": self._ggml.get("padding_token_id"),
        }

    def generation(self) -> dict[str, Any]:
        """Returns what generation_config.json says: the tokens that end an answer, and those that never come."""
        ends = {self._ggml[name] for name in _ENDS if name in self._ggml}
        ends |= {number for number, token in enumerate(self.tokens) if token in _END_SPELLINGS}
        settings = {
            **self.special_ids,
            "eos_token_id": sorted(ends),
            "suppress_tokens": self._ggml.get("suppress_tokens"),
        }
        return {name: value for name, value in settings.items() if value not in (None, [])}

    def tokenizer(self) -> Any:
        """Makes a tokenizer of transformers. Raises ModelError for vocabularies of other kinds than byte-level and SentencePiece."""
        from transformers import PreTrainedTokenizerFast

        kind = self._ggml.get("model")
        if kind == "gpt2":
            cut = self._cut()
            backend, bos = self._byte_level(cut), cut.add_bos
        elif kind == "llama":
            backend, bos = self._sentencepiece(), True
        else:
            raise ModelError(
                f"{self._place}: tokenizer.ggml.model = {kind!r}; read are 'gpt2' (byte-level) and 'llama' (SentencePiece). Set "
                f"model.name to the model's safetensors folder"
            )
        bos = self._ggml.get("add_bos_token", bos) and "bos_token_id" in self._ggml
        ends = self._ggml.get("add_eos_token", False) and "eos_token_id" in self._ggml
        special = {role: self.tokens[self._ggml[name]] for name, role in _IDS.items() if name in self._ggml}
        made = PreTrainedTokenizerFast(
            tokenizer_object=backend, clean_up_tokenization_spaces=False, add_bos_token=bos, add_eos_token=ends,
            **{"bos_token": None, "eos_token": None, **special},
        )  # fmt: skip
        alone = self._templates.keys() <= {"default"}
        made.chat_template = self._templates.get("default") if alone else self._templates
        return made

    def _of_type(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self._types, strict=True) if kind in types]

    def _cut(self) -> _Cut:
        name = self._ggml.get("pre")
        if name not in CUTS:
            said = f"tokenizer.ggml.pre = {name!r}" if name else "no tokenizer.ggml.pre"
            raise ModelError(
                f"{self._place} has {said}, which says how text is cut into words; read are {', '.join(sorted(CUTS))}. Convert the "
                f"model again with llama.cpp's convert_hf_to_gguf.py, or set model.name to its safetensors folder"
            )
        return CUTS[name]

    def _byte_level(self, cut: _Cut) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

        merges = [tuple(merge.split(" ", 1)) for merge in self._ggml.get("merges") or []]
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        try:
            model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut.ignore_merges)
        except Exception as error:  # what the library raises for a merge of unknown tokens is a plain Exception
            raise ModelError(
                f"{self._place}: tokenizer.ggml.merges do not fit the tokens: {error}. Convert the model again"
            ) from error
        backend = Tokenizer(model)
        if self._ggml.get("add_space_prefix"):
            raise refusal("tokenizer.ggml.add_space_prefix", True, f"{self._place}, whose vocabulary is byte-level,")
        splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in cut.expressions]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *splits,
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        self._add_whole(backend)
        return backend

    def _sentencepiece(self) -> Any:
        """Builds the tokenizer as SentencePiece and llama.cpp work: the text after each special token is a text of its own, which
        gets a space before it even if it begins with one. transformers' reader gives the first text alone a space, and one at most.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
        from transformers.tokenization_utils_base import generate_merges

        if "scores" not in self._ggml:
            raise ModelError(f"{self._place} lacks tokenizer.ggml.scores. Convert the model again")
        gemma = self._architecture.startswith("gemma")
        tokens = [_SPACE * len(token) if gemma and token.isspace() and " " in token else token for token in self.tokens]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        # Gemma's scores say nothing of the order of merging; the order of its tokens does.
        best = (
            {token: -number for token, number in vocabulary.items()}
            if gemma
            else dict(zip(tokens, self._ggml["scores"], strict=True))
        )
        unknown = tokens[self._ggml["unknown_token_id"]] if "unknown_token_id" in self._ggml else None
        backend = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=generate_merges(vocabulary, best),
                fuse_unk=True,
                byte_fallback=True,
                unk_token=unknown,
            )
        )
        prefix = self._ggml.get("add_space_prefix", not gemma)
        backend.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
        )
        if gemma:
            backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if prefix else []),
            ]
        )
        self._add_whole(backend)
        return backend

    def _add_whole(self, backend: Any) -> None:
        """Makes control and user-defined tokens match whole in a text."""
        from tokenizers import AddedToken

        backend.add_special_tokens([AddedToken(token, normalized=False) for token in self._of_type(CONTROL, UNKNOWN)])
        backend.add_tokens([AddedToken(token, normalized=False) for token in self._of_type(USER_DEFINED)])
