# pyright: reportMissingImports=false
"""sheeprl's DreamerV3 on the reference workload, timed in a python of its own (see `speed`).

Runs outside the project, where only sheeprl and what it needs are installed: answers the questions
of worker.py, whose few lines are therefore here again. The update is `dreamer_v3_5.train` and the
slow critic's, on one batch that is already in memory: sampling is not in sheeprl's time.
"""

import json
import os
import resource
import sys
import time
import warnings
from importlib.metadata import version

import gymnasium as gym
import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import OmegaConf
from sheeprl.algos.dreamer_v3_5.agent import build_agent
from sheeprl.algos.dreamer_v3_5.dreamer_v3_5 import train, update_target_critic
from sheeprl.algos.dreamer_v3_5.utils import Moments
from sheeprl.utils.utils import dotdict
from torch.nn.functional import one_hot
from torch.utils.flop_counter import FlopCounterMode

ACTIONS = 6
PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed"}


def configured(spec):
    """sheeprl's own configuration of this size, from images alone."""
    changes = [
        *("exp=dreamer_v3_5", "env=dummy", f"algo=dreamer_v3_5_{spec['size'].upper()}"),
        *("algo.cnn_keys.encoder=[rgb]", "algo.mlp_keys.encoder=[]", "algo.total_steps=1"),
        *("metric.log_level=0", "algo.compile.enabled=False", f"fabric.accelerator={device(spec)}"),
        f"algo.per_rank_batch_size={spec['batch']}",
    ]
    with initialize_config_module("sheeprl.configs", version_base="1.3"):
        found = compose("config", overrides=changes)
    return dotdict(OmegaConf.to_container(found, resolve=True, throw_on_missing=False))


def device(spec):
    """Fabric's name of the device."""
    return "cuda" if spec["device"] == "cuda" else "cpu"


def random_batch(config, deter):
    """Sequences of noise, time first, with the step of context that their start is taken from."""
    algo, random = config.algo, np.random.default_rng(0)
    lead = (algo.per_rank_sequence_length + algo.replay_context, algo.per_rank_batch_size)
    choice = torch.from_numpy(random.integers(0, ACTIONS, lead))
    batch = {
        "rgb": torch.from_numpy(random.integers(0, 256, (*lead, 3, 64, 64), np.uint8)),
        "actions": one_hot(choice, ACTIONS).float(),
        "rewards": torch.from_numpy(random.standard_normal((*lead, 1), np.float32)),
        "deter": torch.zeros(*lead, deter, dtype=torch.float16),
        "stoch": torch.zeros(*lead, algo.world_model.stochastic_size, dtype=torch.uint8),
    }
    flags = ("terminated", "truncated", "is_first")
    return batch | {name: torch.zeros(*lead, 1) for name in flags}


def build(spec):
    """One update as a function, and what there is to say of it."""
    config = configured(spec)
    fabric = Fabric(accelerator=device(spec), devices=1, precision=PRECISION[spec["dtype"]])
    fabric.launch()
    space = gym.spaces.Dict({"rgb": gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)})
    world, actor, critic, slow, _ = build_agent(fabric, (ACTIONS,), False, config, space)
    learned = [p for module in (world, actor, critic) for p in module.parameters()]
    optimizer = instantiate(config.algo.optimizer, params=learned, _convert_="all")
    optimizer = fabric.setup_optimizers(optimizer)
    scale = config.algo.actor.moments
    moments = Moments(scale.decay, scale.max, scale.percentile.low, scale.percentile.high)
    deter = config.algo.world_model.recurrent_model.recurrent_state_size
    batch = {k: v.to(fabric.device) for k, v in random_batch(config, deter).items()}
    models = (world, actor, critic, slow, optimizer, moments)

    def update():
        data = {name: value.clone() for name, value in batch.items()}
        train(fabric, config, *models, data, None, (ACTIONS,))
        update_target_critic(critic, slow, config.algo.critic.tau)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize()

    return update, {
        "who": f"sheeprl-{version('sheeprl')}",
        "params": sum(p.numel() for p in learned),
        "batch": spec["batch"],
        "length": config.algo.per_rank_sequence_length,
    }


def timed(update, count):
    """Seconds of each update, those that processors worked on it, and peak memory so far."""
    wall, cpu = [], []
    for _ in range(count):
        start = time.perf_counter(), time.process_time()
        update()
        wall.append(time.perf_counter() - start[0])
        cpu.append(time.process_time() - start[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"seconds": wall, "cpu_seconds": cpu, "rss_mb": peak}


def counted(update):
    """Operations of one update, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        update()
    return {"gflop": counter.get_total_flops() / 1e9}


def main():
    """Hello, then an answer to each question; what libraries print goes to standard error."""
    warnings.filterwarnings("ignore")
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(spec["threads"])
    update, hello = build(spec)
    print(json.dumps(hello), file=answers)
    for line in sys.stdin:
        question, count = line.split()
        found = timed(update, int(count)) if question == "time" else counted(update)
        print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
