"""Is imported by the template from which stage hosts are forked: holds all that a stage host imports, and nothing else."""

from edgelam_fl.node.lean import import_libraries

import_libraries()

import edgelam_fl.node.play  # noqa: E402
import edgelam_fl.node.service  # noqa: E402
import edgelam_fl.wire.grpc.dial  # noqa: E402
import edgelam_fl.wire.grpc.serve  # noqa: E402, F401
