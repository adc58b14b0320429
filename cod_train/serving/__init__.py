"""Checkpoints as model servers: each in a process of its own, of vLLM or of our own engine, ready when it has answered exactly."""

from cod_train.serving.engine import Engine, Launch
from cod_train.serving.server import ModelServer, ServerFailed

__all__ = ["Engine", "Launch", "ModelServer", "ServerFailed"]
