"""The gate for what a node says of itself: no name, number, word or address of a profile gets past it unjudged.

Knows one profile at a time; whether its name is taken and whom the node's key belongs to is the roster's business.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable, Iterator, Mapping

from flwr.app import RecordDict
from google.protobuf.message import DecodeError

from edgelam_fl.addresses import split_address
from edgelam_fl.config import most_read_by_hosts
from edgelam_fl.errors import ConfigError, ProtocolError, known_code
from edgelam_fl.names import printable, why_no_name, why_no_tag
from edgelam_fl.wire import PROTOCOL_VERSION
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.relay import BEHIND

_MOST_BYTES = 256 << 10  # of a whole profile
_MOST_ENTRIES = 64  # of each list and table
_MOST_SHOWN = 40  # characters of a value in a message
# The largest values that a profile may hold: far above any machine, and low enough that sums and products stay numbers.
_MOST: Mapping[str, float] = {
    "memory_available_bytes": 2**50,
    "idle_bytes": 2**50,
    "disk_free_bytes": 2**60,
    "cpu_threads": 2**16,
    "examples": 10**8,
    "held_out": 10**8,
    "link_up_bps": 1e13,
    "link_down_bps": 1e13,
    "round_trip_s": 600.0,
    "disk_write_bytes_per_s": 1e13,
}
_MOST_TOKENS = 2**20
_MOST_LAYER_S = 1e6
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/+-]{0,63}")  # "fp32/bf16", "edgelam-fl"
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_])?")
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)\.?")  # the last label of an address in any spelling of IPv4


def read_profile(content: RecordDict) -> pb.Profile:
    """Reads a node's answer to a query. Raises ProtocolError if it holds no profile, or one that is not to be believed.

    A node of another protocol version, or with a problem of its own, passes: the roster refuses it in its own words.
    """
    try:
        data = content["profile"]["profile"]
        if not isinstance(data, bytes) or len(data) > _MOST_BYTES:
            raise TypeError(f"its profile must be at most {_MOST_BYTES} bytes")
        profile: pb.Profile = pb.Profile.FromString(data)
    except (KeyError, TypeError, DecodeError) as error:
        raise ProtocolError(f"its answer holds no profile that can be read ({type(error).__name__})") from error
    profile.DiscardUnknownFields()
    profile.problem, profile.code = printable(profile.problem), known_code(profile.code)
    profile.chip = printable(profile.chip, _MOST_SHOWN)
    if profile.protocol_version != PROTOCOL_VERSION or profile.problem:
        return profile
    problem = next(_problems(profile), "")
    if problem:
        raise ProtocolError(problem)
    return profile


def _problems(profile: pb.Profile) -> Iterator[str]:
    """Yields what is wrong with a profile."""
    if reason := why_no_name(profile.name):
        yield f"its name {_shown(profile.name)} {reason}"
    if profile.role not in (pb.DEVICE, pb.EDGE):
        yield f"its role {profile.role} must be {pb.DEVICE} (device) or {pb.EDGE} (edge server)"
    for field in ("tags", "bases", "codecs", "versions", "base_seconds", "layer_times"):
        if len(getattr(profile, field)) > _MOST_ENTRIES:
            yield f"its {field} has {len(getattr(profile, field))} entries, {_MOST_ENTRIES} are allowed"
    for tag in profile.tags:
        if reason := why_no_tag(tag):
            yield f"its tag {_shown(tag)} {reason}"
    yield from _unknown_words("bases", profile.bases)
    yield from _unknown_words("codecs", profile.codecs)
    yield from _unknown_words("versions", profile.versions)
    yield from _unknown_words("versions", profile.versions.values(), _VERSION)
    if reason := _why_no_trust(profile.trust):
        yield f"its trust {_shown(profile.trust)} {reason}"
    for field, most in _MOST.items():
        yield from _out_of_range(field, getattr(profile, field), most)
    for field in ("bad", "skipped", "cut", "cut_answers", "unread", "unmeasured"):
        yield from _out_of_range(f"data.{field}", getattr(profile.data, field), _MOST["examples"])
    yield from _bad_seconds("base_seconds", profile.base_seconds)
    for time in profile.layer_times:
        yield from _out_of_range("layer_times.tokens", time.tokens, _MOST_TOKENS)
        yield from _bad_seconds("layer_times.seconds", time.seconds)
    if profile.address and (reason := _why_no_address(profile.address, profile.name)):
        yield f"its address {_shown(profile.address)} {reason}"


def _why_no_trust(trust: str) -> str:
    try:
        most_read_by_hosts(trust or "hosts")
    except ValueError as error:
        return str(error)
    return ""


def _unknown_words(field: str, words: Iterable[str], pattern: re.Pattern[str] = _KEY) -> Iterator[str]:
    for word in words:
        if not pattern.fullmatch(word):
            yield f"its {field} has {_shown(word)}, which is not a word of at most 64 letters, digits and '.+-_/'"


def _out_of_range(field: str, value: float, most: float) -> Iterator[str]:
    if not (math.isfinite(value) and 0 <= value <= most):
        yield f"its {field} = {value:g} must be 0 to {most:g}"


def _bad_seconds(field: str, seconds: Mapping[str, float]) -> Iterator[str]:
    yield from _unknown_words(field, seconds)
    for value in seconds.values():
        yield from _out_of_range(field, value, _MOST_LAYER_S)


def _shown(text: str) -> str:
    return repr(printable(text, _MOST_SHOWN))


# ---------------------------------------------------------------- addresses


def _why_no_address(address: str, name: str) -> str:
    """Returns why other nodes are not asked to dial an address, as the end of a sentence; empty if they may be."""
    if address.startswith(BEHIND):
        return "" if address == BEHIND + name else f"must be {BEHIND}{name}: a node is reached under its own name"
    try:
        host, port = split_address(address, "address")
    except ConfigError:
        return "must be HOST:PORT"
    if not port:
        return "must be HOST:PORT with a port of at least 1"
    return _why_no_host(host)


def _why_no_host(host: str) -> str:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        plain = _HOST.fullmatch(host) and not _NUMBER.fullmatch(host.rpartition(".")[2])
        return "" if plain else "must name a host or an IP address in its usual form"
    inner = getattr(found, "ipv4_mapped", None) or found  # ::ffff:169.254.1.1
    if inner.is_link_local:
        return "is link-local: such an address may belong to a service of the machine that dials it"
    if inner.is_multicast or inner.is_unspecified or inner == ipaddress.ip_address("255.255.255.255"):
        return "is no address of one machine"
    return ""
