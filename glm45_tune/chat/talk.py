"""A conversation on the terminal, word by word."""

from pathlib import Path
from threading import Thread

from rich.console import Console

from glm45_tune.chat.model import Answer, ChatModel


def talk(model: str | Path, adapter: str | Path | None, think: bool | None, prompt: str | None, max_new_tokens: int) -> None:
    """Ask `prompt` once, or read questions until an empty line. Answers go to stdout as they are written."""
    chat = ChatModel(model, adapter)
    console, messages = Console(stderr=True), []
    while True:
        question = prompt or _ask(console)
        if not question:
            return
        messages.append({"role": "user", "content": question})
        answer = _stream(chat, messages, think, max_new_tokens)
        messages.append({"role": "assistant", "content": answer.content, "reasoning_content": answer.thought})
        if prompt:
            return


def _ask(console: Console) -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


def _stream(chat: ChatModel, messages: list[dict], think: bool | None, max_new_tokens: int) -> Answer:
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = chat.prompt(messages, think)
    worker = Thread(target=chat.generate, args=([text], max_new_tokens), kwargs={"streamer": streamer})
    worker.start()
    pieces = []
    for piece in streamer:
        pieces.append(piece)
        print(piece, end="", flush=True)
    worker.join()
    print()
    return Answer("".join(pieces))
