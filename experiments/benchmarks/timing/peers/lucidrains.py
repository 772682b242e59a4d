# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""lucidrains' dreamer4 at the sizes of `nested bench dreamer4`, timed in a python of its own.

Runs outside the project: answers the questions of worker.py, whose few lines are therefore here
again. Widths, depths, heads and tokens are ours; a quarter of its batches learn the shortcut, as a
quarter of our rows do, so a median over batches has no shortcut in it, in its favour. LPIPS, action
and reward losses are off. `decode` is not answered: it decodes whole videos.
"""

import json
import sys
import time
import warnings
from importlib.metadata import version

import torch
from dreamer4 import DynamicsWorldModel, VideoTokenizer


class Subject:
    """Both models on random data."""

    def __init__(self, size):
        torch.manual_seed(0)
        names = ("width", "layers", "heads", "groups", "every")
        video, dynamics = (
            dict(zip(names, size[name], strict=False)) for name in ("tokenizer", "dynamics")
        )
        self.size = size
        self.tokenizer = VideoTokenizer(
            dim=video["width"], dim_latent=size["channels"], patch_size=size["patch"],
            image_size=size["side"], num_latent_tokens=size["latents"],
            encoder_depth=video["layers"], decoder_depth=video["layers"],
            time_block_every=video["every"], attn_heads=video["heads"],
            attn_dim_head=video["width"] // video["heads"], lpips_loss_weight=0.0,
        )  # fmt: skip
        self.dynamics = DynamicsWorldModel(
            dim=dynamics["width"], dim_latent=size["channels"], max_steps=size["k_max"],
            num_register_tokens=size["registers"], num_spatial_tokens=size["spatial"],
            num_latent_tokens=size["latents"], depth=dynamics["layers"],
            time_block_every=dynamics["every"], attn_heads=dynamics["heads"],
            attn_dim_head=dynamics["width"] // dynamics["heads"], prob_shortcut_train=0.25,
            num_discrete_actions=size["actions"], predict_terminals=False,
        )  # fmt: skip
        batch, frames, side = size["batch"], size["frames"], size["side"]
        self.video = torch.rand(batch, 3, frames, side, side)
        self.latents = self.random_latents(batch, frames)
        self.actions = torch.randint(size["actions"], (batch, frames, 1))
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
            for model in (self.tokenizer, self.dynamics)
        ]
        self.runs = {"tokenizer": self.update_tokenizer, "dynamics": self.update_dynamics}
        for past in size["contexts"]:
            self.runs[f"frame_after_{past}"] = self.frame_after(past)

    def random_latents(self, batch, frames):
        return torch.rand(batch, frames, self.size["latents"], self.size["channels"]) * 2 - 1

    def update_tokenizer(self):
        self.tokenizer(self.video).backward()
        self.step(0)

    def update_dynamics(self):
        loss = self.dynamics(
            latents=self.latents, discrete_actions=self.actions,
            add_autoregressive_action_loss=False,
        )  # fmt: skip
        loss.backward()
        self.step(1)

    def step(self, which):
        self.optimizers[which].step()
        self.optimizers[which].zero_grad()

    def frame_after(self, past):
        """A frame sampled after so many whose keys and values are in its cache."""
        options = {
            "num_steps": self.size["steps"], "return_decoded_video": False,
            "return_time_cache": True,
        }  # fmt: skip
        self.dynamics.eval()
        with torch.no_grad():
            prompt = self.random_latents(1, past - 1)[:, :, None]
            made = self.dynamics.generate(past, prompt_latents=prompt, **options)
        latents, cache = made if isinstance(made, tuple) else (made.latents, made.time_cache)
        latents = self.random_latents(1, past)[:, :, None]

        def frame():
            self.dynamics.eval()
            with torch.no_grad():
                self.dynamics.generate(
                    past + 1, prompt_latents=latents, time_cache=cache, **options
                )
            self.dynamics.train()

        return frame

    def timed(self, name, count):
        """Seconds of the processor, of each of `count` runs; none for what it does not do."""
        found = []
        for _ in range(count if name in self.runs else 0):
            start = time.process_time()
            self.runs[name]()
            found.append(time.process_time() - start)
        return {"seconds": found}


def say(answer):
    print(json.dumps(answer), flush=True)


def main():
    """Hello, then answers until the pipe closes."""
    warnings.simplefilter("ignore")
    size = json.loads(sys.argv[1])
    torch.set_num_threads(size["threads"])
    subject = Subject(size)
    models = {"tokenizer": subject.tokenizer, "dynamics": subject.dynamics}
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    who = f"lucidrains-{version('dreamer4')}"
    say({"who": who, "params": params | {"frame": params["dynamics"]}})
    for line in sys.stdin:
        name, count = line.split()
        say(subject.timed(name, int(count)))


if __name__ == "__main__":
    main()
