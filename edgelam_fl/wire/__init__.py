"""The data plane: frames, codecs, links, their gRPC service, and the local control of a stage host. Knows no models."""

PROTOCOL_VERSION = 2
