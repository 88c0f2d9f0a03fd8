"""The data plane: frames, codecs, links, their gRPC services, and the local control of a stage host. Knows no models."""

PROTOCOL_VERSION = 10  # raised by every change that an older node would misread; unlike versions refuse each other
