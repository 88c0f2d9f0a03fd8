"""Keeps a node from importing the database that Flower's server has: importing this module, before Flower, is enough.

Flower's store of messages in memory, which a SuperNode has, imports the one in a database beside it, and with that a third of a
SuperNode's memory. For processes of a node alone: in one that has imported this, a server could not keep anything.
"""

from __future__ import annotations

import sys
from types import ModuleType

_MODULE, _CLASS = "flwr.supercore.object_store.sql_object_store", "SqlObjectStore"

if _MODULE not in sys.modules:
    sys.modules[_MODULE] = ModuleType(_MODULE)
    setattr(sys.modules[_MODULE], _CLASS, type(_CLASS, (), {}))
