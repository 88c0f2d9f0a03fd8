"""Decides who does what: profiles, measured speeds and a run file become layouts and plans. Pure functions of plain data."""
