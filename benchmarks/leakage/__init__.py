"""What an honest but curious participant reads from a split run, by attack. Each part is a module with its own result file.

`python -m benchmarks.leakage [--part NAME] [--smoke]`; without --part, all parts run one after another.
"""

from __future__ import annotations

# The parts, in the order in which they run, and their result files under benchmarks/results/.
PARTS = {
    "states": "leakage",
    "tuned": "leakage_tuned",
    "labels": "leakage_labels",
    "members": "leakage_members",
    "updates": "leakage_updates",
    "defences": "leakage_defences",
}
