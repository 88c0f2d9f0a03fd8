"""Testbeds: machines of named shapes, each one a container on this machine. The command is `python -m testbed`.

The package is not part of the library and is in no wheel; the image's files and the default testbed are in docker/. (A
package named docker would hide the one that docker-compose itself imports.)
"""
