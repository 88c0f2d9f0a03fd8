"""A split loop in the manner of code that is published with papers: one device after the other, a whole batch as one message.

The server waits for a device, computes, answers, and waits again: nothing overlaps, neither computing with sending nor one
device with another. Tensors are pickled, with a length before them, over plain TCP sockets.
"""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

import torch

from benchmarks.compared.load import Load, loss_over_all, tokens_of
from benchmarks.compared.workers import Trains
from edgelam_fl.model.adapter import Span

FRONT, BACK = 2, 2  # layers that devices keep
_GO = b"go"


def serial_server(load: Load, threads: int) -> tuple[Trains, int]:
    """Trains the middle layers for all devices of the load. Says the port that devices connect to."""
    torch.set_num_threads(threads)
    listening = socket.create_server(("127.0.0.1", 0))
    (middle,) = load.stages(Span(FRONT, load.source.num_layers - BACK))
    optimizer = load.optimizer(list(middle.adapter_parameters.values()))
    devices: list[_Peer] = []

    def trains(number: int) -> int:
        while len(devices) < len(load.files):
            devices.append(_Peer(listening.accept()[0]))
        for device in devices:
            device.send(_GO)
            states_BTD, lengths = device.receive()
            states_BTD.requires_grad_(True)
            out_BTD = middle(states_BTD, lengths)
            device.send(out_BTD.detach())
            out_BTD.backward(device.receive())
            device.send(states_BTD.grad)
            optimizer.step()
            optimizer.zero_grad()
        return 0

    return trains, listening.getsockname()[1]


def serial_device(load: Load, device: int, address: tuple[str, int], threads: int) -> tuple[Trains, None]:
    """Trains a device's first and last layers, when the server says that its turn has come."""
    torch.set_num_threads(threads)
    layers = load.source.num_layers
    front, back = load.stages(Span(0, FRONT, embed=True), Span(layers - BACK, layers, head=True))
    optimizer = load.optimizer([*front.adapter_parameters.values(), *back.adapter_parameters.values()])
    batches = load.with_settings("split.micro_batches=1").batches(device)
    server = _Peer(socket.create_connection(address))

    def trains(number: int) -> int:
        (unit,) = batches[number % len(batches)]
        assert server.receive() == _GO
        states_BTD = front(unit.inputs, unit.row_lengths)
        server.send((states_BTD.detach(), unit.row_lengths))
        back_BTD = server.receive().requires_grad_(True)
        (loss_over_all(back(back_BTD, unit.row_lengths), unit.labels) / unit.count).backward()
        server.send(back_BTD.grad)
        states_BTD.backward(server.receive())
        optimizer.step()
        optimizer.zero_grad()
        return tokens_of([unit])

    return trains, None


class _Peer:
    """The other end of a socket."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, thing: Any) -> None:
        data = pickle.dumps(thing, protocol=pickle.HIGHEST_PROTOCOL)
        self._socket.sendall(struct.pack(">Q", len(data)) + data)

    def receive(self) -> Any:
        return pickle.loads(self._exactly(struct.unpack(">Q", self._exactly(8))[0]))  # noqa: S301 as that code does

    def _exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise ConnectionError("the other end is gone")
            view = view[got:]
        return data
