"""Decides who does what: profiles, measured speeds and a run file become layouts and plans. Pure functions of plain data.

From bottom to top: `spec`, `bases`, `layout`; `reading`, `making` (plans); `facts`, `chain_memory`, `chain_cost`, `search` (numbers
alone); `footprint`, `speeds`, `instance` (numbers from profiles); `what_fits`, `placement`. How chains are chosen:
docs/planner.md.
"""
