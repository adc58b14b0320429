"""`python -m cod_train.verl_main [--dry-run|--in-process] key=value ...`: train with verl, on a Ray cluster or this machine's CPU.

    python -m cod_train.verl_main --config-name=cpu_tiny trainer.total_training_steps=30
    python -m cod_train.verl_main --config-name=cluster_8b trainer.nnodes=3 --dry-run

A config is one of `cod_train/conf`, over verl's own defaults; every key can be given on the command line. docs/training.md says what
the dials are.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONF = Path(__file__).parent / "conf"

OURS = ("cod.", "data.eval_seed", "data.recorded_share")
"""Keys that hydra takes although no config file may have them."""

CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Large blocks stay with the process: a step frees and takes the same ones again. One arena, because only the first takes any
    # size, and an actor's work is not done by its first thread.
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_ARENA_MAX": "1",
}
"""Of processes that compute on the CPU; allocators read theirs when they start."""


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    from cod_agent.errors import CodError

    collect_less()
    given = list(sys.argv[1:] if arguments is None else arguments)
    dry, alone = "--dry-run" in given, "--in-process" in given
    try:
        config = composed([argument for argument in given if argument not in ("--dry-run", "--in-process")])
        if dry:
            from cod_train.dry_run import show

            show(config)
        else:
            if alone:
                _with_environment(CPU_ENVIRONMENT)
            with alone_in(Path(config.trainer.default_local_dir)):
                (train_in_process if alone else train)(config)
    except CodError as error:
        # What Ray brings back from an actor has the whole trace for a message, and the error itself inside.
        raise SystemExit(f"Error: {getattr(error, 'cause', error)}") from None


def collect_less() -> None:
    """Look for garbage after 50,000 new objects, not 700: a quarter of the seconds that torch and verl take to import is that."""
    gc.set_threshold(50_000, 20, 20)


def _with_environment(wanted: dict[str, str]) -> None:
    """Start this program again where its allocator did not get its settings: a step takes up to ten times as long without."""
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        again = [sys.executable, "-m", "cod_train.verl_main", *sys.argv[1:]]
        os.execve(sys.executable, again, {**wanted, **os.environ})


def composed(arguments: list[str]) -> Any:
    """The config of these arguments, composed by hydra: `--config-name=NAME` (default cpu_tiny), `--config-dir=DIR`, key=value.

    Raises:
        UsageError: hydra does not take them.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from cod_agent.errors import UsageError
    from cod_agent.policies import POLICIES, folder_of

    name, folder, overrides = "cpu_tiny", CONF, []
    for argument in arguments:
        if argument.startswith("--config-name="):
            name = argument.partition("=")[2]
        elif argument.startswith("--config-dir="):
            folder = Path(argument.partition("=")[2]).absolute()
        elif argument.startswith("-"):
            raise UsageError(
                f"no option {argument}: there are --config-name=, --config-dir=, --dry-run, --in-process and key=value"
            )
        else:
            # Our own section is checked by its settings, whether a config file spells a key out or not.
            overrides.append(f"++{argument}" if argument.startswith(OURS) else argument)
    try:
        with initialize_config_dir(str(folder), version_base=None):
            config = compose(name, [*overrides, _search_path()])
        base = OmegaConf.select(config, "actor_rollout_ref.model.path")
        if base in POLICIES:
            config.actor_rollout_ref.model.path = str(folder_of(base))
        # Processes on other nodes start elsewhere.
        config.trainer.default_local_dir = str(Path(config.trainer.default_local_dir).absolute())
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(f"the config does not compose: {error}") from None
    return config


def _search_path() -> str:
    """Where the configs are found that a config builds on: verl's defaults, and ours for a config of the user's own.

    verl's folder is looked up, not imported: that takes several seconds, and a mistake in a config shall be told at once.

    Raises:
        MissingExtra: verl is not installed.
    """
    from importlib.util import find_spec

    from cod_agent.errors import MissingExtra

    verl = find_spec("verl")
    if verl is None or not verl.submodule_search_locations:
        raise MissingExtra("training with verl", "train")
    defaults = Path(verl.submodule_search_locations[0]) / "trainer" / "config"
    return f"hydra.searchpath={json.dumps([f'file://{defaults}', 'pkg://cod_train.conf'])}"


@contextlib.contextmanager
def alone_in(folder: Path, what: str = "training") -> Iterator[None]:
    """Two trainings in one folder would overwrite each other's checkpoints: the second is refused, also while a first one
    outlives the command that started it.

    Args:
        what: a program of which there is one in a folder; its lock is called after it.

    Raises:
        UsageError: another one runs there.
    """
    import fcntl

    from cod_agent.errors import UsageError

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{what}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise UsageError(
                f"another {what} runs in {folder} (process {lock.read().strip() or 'unknown'}): wait for it, or end it"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def train(config: Any) -> None:
    """Run the training a config describes, on a Ray of its own or the one `ray_kwargs.ray_init.address` names.

    Raises:
        UsageError: the config does not hold together, or the packages are not there.
    """
    from cod_train.checks import check_before_training
    from cod_train.settings import Settings
    from cod_train.verl import compat

    compat.check_version()
    check_before_training(config, Settings.of(config))
    environment = _environment(config)
    os.environ.update(environment)
    check_packs(config)  # before a cluster is asked for
    import ray
    from omegaconf import open_dict
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    with open_dict(config):
        init = config.ray_kwargs.ray_init
        if init.get("address") or os.environ.get("RAY_ADDRESS"):
            init.num_cpus = init.num_gpus = None  # a running Ray knows its own
        else:
            init.address = "local"  # without a word, Ray joins whatever runs on this machine
        given = dict(init.get("runtime_env") or {})
        init.runtime_env = {
            "worker_process_setup_hook": "cod_train.verl_main.collect_less",
            **given,
            "env_vars": {**environment, **(given.get("env_vars") or {})},
        }
    validate_config(config=config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    run_ppo(config, task_runner_class=ray.remote(task_runner()))


def train_in_process(config: Any) -> None:
    """The same training in this process, without Ray: one rank, on the CPU.

    Raises:
        UsageError: the config does not hold together, or wants more.
    """
    from cod_train.checks import check_before_training
    from cod_train.settings import Settings

    os.environ.update(_environment(config))
    check_before_training(config, Settings.of(config))
    check_packs(config)
    from cod_train.in_process import InProcess

    run = InProcess(config)
    try:
        run.fit()
    finally:
        run.close()


def check_packs(config: Any) -> None:
    """Read what is recorded as the trainer will.

    Raises:
        UsageError: it cannot be trained on, or the base's folder has no tokenizer.
    """
    from transformers import AutoTokenizer

    from cod_agent.errors import UsageError
    from cod_train.verl.packs import Packs

    if config.data.source == "live":
        return
    base = config.actor_rollout_ref.model.path
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise UsageError(f"no tokenizer in {base}: give --base a Hugging Face folder ({error})") from None
    Packs("train", tokenizer, config.data)


def task_runner() -> type:
    """verl's task runner, with our trainer."""
    from cod_train.verl import compat

    class TaskRunner(compat.task_runner_class()):  # type: ignore[misc]
        def run(self, config: Any) -> Any:
            from cod_train.verl.trainer import SegmentCreditTrainer

            compat.use_trainer(SegmentCreditTrainer)
            return super().run(config)

    return TaskRunner


def _environment(config: Any) -> dict[str, str]:
    """What all processes of a run have in common."""
    from cod_train.settings import DEVICE

    cpu = config.trainer.device == "cpu"
    out = {
        DEVICE: "cpu" if cpu else "gpu",
        "VERL_USE_EXTERNAL_MODULES": "cod_train.verl.plugin",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_DEDUP_LOGS": "0",
    }
    folder = Path(config.trainer.default_local_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    # A file for each sitting: verl's logger begins its file anew.
    sitting = len(list(folder.glob("metrics-*.jsonl"))) + 1
    metrics = folder / f"metrics-{sitting:03d}.jsonl"
    out |= {"TENSORBOARD_DIR": str(folder / "tensorboard"), "VERL_FILE_LOGGER_PATH": str(metrics)}
    return {**out, **CPU_ENVIRONMENT} if cpu else out


if __name__ == "__main__":
    main()
