"""The embedded engine as a server of its own: any Hugging Face folder, on the CPU, up in seconds.

    python -m cod_train.serving.embedded FOLDER --name NAME@DIGEST --port 8001

It is the engine that draws the trainer's answers without a GPU (`cod_train.engines`) behind the trainer's endpoint
(`cod_train.endpoint`): exact token ids, log-probabilities of the model's own distribution, and a 404 for any other name.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cod_agent import __version__
from cod_agent.errors import CodError, MissingExtra, ModelRefused, UsageError
from cod_train.endpoint import Endpoint
from cod_train.engines import Engine, engine_for
from cod_train.model import Drawn, Generate
from cod_train.verl_main import collect_less

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FINGERPRINT = f"cod-embedded-{__version__}"
"""The `system_fingerprint` of every answer: the engine and its version."""


async def serve(engine: Engine, tokenizer: PreTrainedTokenizerBase, name: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C; answers under way get two seconds to finish.

    Raises:
        UsageError: the port is taken, or the tokenizer has no chat template.
    """
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    length = engine.context_length
    async with Endpoint(name, tokenizer, answers_of(engine), context_length=length, port=port) as endpoint:
        logging.info("%s is served at %s", name, endpoint.base_url)
        await ended.wait()


def answers_of(engine: Engine) -> Generate:
    """The engine as an endpoint asks it."""

    async def generate(request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Drawn:
        asked = dict(sampling_params)
        if (top_k := asked.pop("top_k", -1)) != -1:
            raise ModelRefused(f"this engine samples from all tokens: leave `top_k` out (it is {top_k})")
        drawn = await asyncio.wrap_future(engine.ask(prompt_ids, **asked))
        return Drawn(drawn.ids, drawn.logprobs, drawn.finish, FINGERPRINT)

    return generate


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder.

    Raises:
        MissingExtra: transformers is not installed.
        UsageError: there is none, or it cannot be read.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingExtra("the embedded engine", "train") from None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers raises for files of others
        raise UsageError(f"no tokenizer can be read from {folder}: {error}") from None


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cod_train.serving.embedded", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="a model in Hugging Face form")
    parser.add_argument("--name", required=True, help="as requests have to call it")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; 0 takes a free one")
    parser.add_argument("--length", type=int, help="longest conversation in tokens (default: what the model takes)")
    parser.add_argument("--slots", type=int, default=64, help="answers drawn at once")
    parser.add_argument("--threads", type=int, default=1, help="of torch; numpy's are OMP_NUM_THREADS")
    parser.add_argument("--seed", type=int, help="of the draws of requests without one (default: another each time)")
    said = parser.parse_args(words)
    collect_less()  # the tokenizer brings torch along
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        tokenizer = tokenizer_of(said.folder)
        engine = engine_for(said.folder, slots=said.slots, length=said.length, threads=said.threads, seed=said.seed)
        try:
            asyncio.run(serve(engine, tokenizer, said.name, said.port))
        finally:
            engine.close()
    except CodError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
