"""A dishonest device: its frames are changed on their way out. Knows frames and links; knows neither hosts nor what they check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from edgelam_fl.split.route import Dial
from edgelam_fl.wire import edgelam_pb2 as pb
from edgelam_fl.wire.link import Frame, Link
from edgelam_fl.wire.terms import LinkTerms, MakeTerms

# header and tensor of a frame that leaves -> what leaves instead; None: nothing does
Change = Callable[[pb.Header, torch.Tensor | None], tuple[pb.Header, torch.Tensor | None] | None]

_MAKE_TERMS = 5  # place of the terms among a dial's arguments


def dishonest(dial: Dial, change: Change) -> Dial:
    """Returns a dial whose links change every frame that their device sends."""

    def dialled(*arguments: Any, **options: Any) -> Link:
        link = dial(*arguments, **options)
        send = link.send

        def hostile(header: pb.Header, tensor: torch.Tensor | None = None) -> None:
            changed = change(header, tensor)
            if changed is not None:
                send(*changed)

        link.send = hostile  # type: ignore[method-assign]
        return link

    return dialled


def with_a_dishonest_host(dial: Dial, change: Change) -> Dial:
    """Returns a dial to hosts whose frames are changed before the dialler reads them."""

    def changed_by(make_terms: MakeTerms) -> MakeTerms:
        def terms(*arguments: Any) -> LinkTerms:
            honest = make_terms(*arguments)

            def on_frame(link: Link, frame: Frame) -> None:
                changed = change(frame.header, frame.tensor)
                if changed is not None:
                    honest.on_frame(link, Frame(*changed))

            return replace(honest, on_frame=on_frame)

        return terms

    def dialled(*arguments: Any) -> Link:
        changed_arguments: list[Any] = list(arguments)
        changed_arguments[_MAKE_TERMS] = changed_by(arguments[_MAKE_TERMS])
        return dial(*changed_arguments)

    return dialled


def on(kind: int, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor, **fields: Any) -> Change:
    """Returns a change of the training frames of one kind: of their tensor, and of fields of their header."""

    def change(header: pb.Header, old: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None]:
        if header.kind != kind or header.phase == pb.EVAL:
            return header, old
        for name, value in fields.items():
            setattr(header, name, value)
        return header, None if old is None else tensor(old.detach()).contiguous()

    return change


def both(first: Change, second: Change) -> Change:
    """Returns one change after the other."""

    def change(header: pb.Header, tensor: torch.Tensor | None) -> tuple[pb.Header, torch.Tensor | None] | None:
        changed = first(header, tensor)
        return None if changed is None else second(*changed)

    return change


def filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns what fills a tensor with one value."""
    return lambda tensor: torch.full_like(tensor, value)
