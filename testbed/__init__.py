"""Testbeds: several machines of named shapes, played by containers on this one. `python -m testbed` is its command.

Stands beside the library and is in no wheel; the image and the files that it reads are in docker/. (A package named
docker would hide the one that docker-compose itself imports.)
"""
