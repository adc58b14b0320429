"""What plugs into verl 0.9.1: the packs, the workers that live them, the trainer with segment credit, and the CPU platform.

packs.py     which packs a step is made of: new ones, recorded ones, or both
worker.py    lives them with the runtime's own agent and hands the rows to TransferQueue
trainer.py   verl's synchronous trainer; advantages from labels, rows laid out evenly
cpu_platform.py, cpu_rollout.py   the CPU as verl's accelerator, and what samples on it
token_logprobs.py   log-probabilities on a GPU that has no flash-attn
plugin.py    what every process of a run loads
compat.py    every private name of verl that is used here
"""
