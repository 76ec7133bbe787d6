"""A server on loopback that answers with whatever bytes a test has."""

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = bytes | Callable[[socket.socket], None]


def http(body: bytes | str, status: str = "200 OK", headers: str = "") -> bytes:
    """A whole answer."""
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
    return head.encode() + body


def stream(body: bytes | str) -> bytes:
    """An answer that ends with its connection, as streams do."""
    body = body.encode() if isinstance(body, str) else body
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body


def events(*documents: object, end: str = "data: [DONE]\n\n") -> str:
    return "".join(f"data: {json.dumps(document)}\n\n" for document in documents) + end


def delta(**fields: object) -> dict:
    return {"choices": [{"index": 0, "delta": fields}]}


MODELS = http('{"data": [{"id": "tuned"}]}')


@contextmanager
def answering(*answers: Answer, models: Answer = MODELS) -> Iterator[tuple[str, list[bytes]]]:
    """(URL, the heads of what it was asked).

    GETs are answered with `models`, POSTs with the answers in turn, the last one again and

    again; each on a connection that is then closed. An answer is bytes, or what is to be done with
    the connection.
    """
    asked, waiting, is_over = [], list(answers), threading.Event()
    listening = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            data = b""
            while b"\r\n\r\n" not in data:
                data += connection.recv(65536) or b"\r\n\r\n"
            head, _, body = data.partition(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            while length and len(body) < int(length[1]):
                body += connection.recv(65536)
            asked.append(head)
            answer = models if head.startswith(b"GET") else waiting.pop(0) if len(waiting) > 1 else waiting[0]
            if callable(answer):
                answer(connection)
            else:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while not is_over.is_set():
            with suppress(OSError):
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", asked
    finally:
        is_over.set()
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def without_end(front: bytes, piece: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """An answer that begins so and goes on for ever."""

    def send(connection: socket.socket) -> None:
        connection.sendall(front)
        waiting = threading.Event()
        while True:
            connection.sendall(piece)
            waiting.wait(pause)

    return send
