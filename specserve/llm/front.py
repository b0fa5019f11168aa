"""What `LLM` and `AsyncLLM` are both: an engine that is started once and closed once, and a thread that talks to it.

Owns the engine's life, at the end of the program and in a fork of it too. How calls wait is the classes' own.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from ..config import ServeConfig
from ..errors import EngineDeadError, UserError
from ..messages import EngineInfo
from ..model.store import resolve_model
from ..text.tokenizer import TextTokenizer
from .loop_thread import LoopThread
from .options import config_of
from .params import SamplingParams
from .service import Adapter, Ask, Service

T = TypeVar("T")
Params = SamplingParams | Sequence[SamplingParams] | None
Adapters = Adapter | Sequence[Adapter | None] | None


class Front:
    """An engine of this program."""

    def __init__(self, model: str | os.PathLike[str] | None = None, **options: Any):
        self._config = config_of(model, options)
        self._thread: LoopThread | None = None
        self._service: Service | None = None
        self._pid = os.getpid()
        self._closed = False
        self._starting = threading.RLock()  # a handler of signals may call what is interrupted

    def _start(self) -> None:
        """Load the model, which takes seconds. Raises `UserError` that says why it cannot be served."""
        with self._starting:
            if self._service is not None or self._closed:
                return
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # cores are the engine's
            if self._config.adapters_dir is not None and not Path(self._config.adapters_dir).is_dir():
                raise UserError(
                    f"adapters_dir {self._config.adapters_dir!r} is not a directory; create it or leave it out",
                    param="adapters_dir",
                )
            model_dir = resolve_model(self._config.model, self._config.revision, progress=sys.stderr.isatty())
            thread = LoopThread(f"specserve {model_dir.name}")
            try:
                service = thread.call(_started(self._config, model_dir))
            except BaseException:
                thread.stop()
                raise
            # Also at the end of the program, while threads still run.
            self._finalizer = weakref.finalize(self, _close, service, thread, self._pid)
            self._thread, self._service = thread, service
            if self._closed:  # meanwhile
                self._finalizer()

    def _end(self) -> None:
        self._closed = True
        if self._service is not None:
            self._finalizer()

    def _running(self) -> tuple[Service, LoopThread]:
        if self._pid != os.getpid():
            raise EngineDeadError("this LLM belongs to the process that made it; make another one here")
        if self._closed or self._service is None or self._thread is None:
            raise EngineDeadError("this LLM is closed" if self._closed else "this LLM has not been started")
        return self._service, self._thread

    def _call(self, work: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        service, thread = self._running()
        return thread.call(work(service))

    async def _acall(self, work: Callable[[Service], Coroutine[Any, Any, T]]) -> T:
        service, thread = self._running()
        return await thread.acall(work(service))

    @property
    def model_name(self) -> str:
        """The base model's name."""
        return self._running()[0].model_name

    @property
    def engine_info(self) -> EngineInfo:
        """What the engine serves: model, device, dtype, context, KV blocks."""
        return self._running()[0].engine.info

    def get_tokenizer(self) -> TextTokenizer:
        """The base model's, as prompts are read with it: `encode(text)`, `decode(ids)`."""
        return self._running()[0].generator.prompts.tokenizer


async def _started(config: ServeConfig, model_dir: Path) -> Service:
    service = Service(config, model_dir)
    await service.start()
    return service


def _close(service: Service, thread: LoopThread, pid: int) -> None:
    """Where garbage is collected on the thread itself, the engine is told and not waited for.

    A fork of process `pid` has a copy of all this without the thread, and the engine is not its own to end.
    """
    if os.getpid() != pid:
        return
    if thread.is_current:
        closing = thread.submit(service.close())
        closing.add_done_callback(lambda done: thread.stop())
        return
    with suppress(Exception):
        thread.call(service.close())
    thread.stop()


def single(asks: list[Ask]) -> Ask:
    if len(asks) != 1:
        raise UserError(
            f"{len(asks)} prompts cannot be streamed as one; stream each on its own (AsyncLLM runs them side by side)",
            param="prompt",
        )
    return asks[0]
