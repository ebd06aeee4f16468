"""Which ways to take a step are compared on a GPU, and on which networks."""

from __future__ import annotations


def variants(device: str) -> dict[str, type]:
    """The ways to take a step that are compared, ours first."""
    from benchmarks.common.variants import (
        CompiledFlatGathered,
        CompiledUnrolledGathered,
        Flat,
        Foreach,
        FusedForeach,
        NaiveLoop,
        Ours,
    )

    class FlatGathered(CompiledFlatGathered):
        """Flat tensors, the gradients copied to their places in them first."""

        def __init__(self, problem) -> None:
            super().__init__(problem)
            self.update = Flat.update  # nothing is compiled before its first call

    def ours(name: str) -> type:
        return type(f"Ours{name.title()}", (Ours,), {"backend": name, "__doc__": f"`step()` on the {name} backend."})

    class Captured(Ours):
        """`step()` in a CUDA graph, the step alone."""

        backend = "cuda"

        def __init__(self, problem) -> None:
            import torch

            super().__init__(problem, capturable=True)
            self.graph, self.steps = torch.cuda.CUDAGraph(), 0

        def step(self) -> None:
            import torch

            self.steps += 1
            if self.steps == 2:  # the first one is eager; a capture does nothing yet
                with torch.cuda.graph(self.graph):
                    super().step()
            self.graph.replay() if self.steps > 1 else super().step()

    backends = ("cuda", "triton", "torch") if device == "cuda" else ("torch",)
    own = {f"step(), {name}": ours(name) for name in backends}
    if device == "cuda":
        own = {"step(), cuda": own.pop("step(), cuda"), "step(), cuda, captured": Captured} | own
    others = {"naive loop": NaiveLoop, "foreach": Foreach, "fused + foreach": FusedForeach, "flat + copy": FlatGathered}
    if device == "cuda":
        others["compiled unrolled + copy"] = CompiledUnrolledGathered
    return own | others


def resnet50():
    """Its body."""
    from torch import nn
    from torchvision.models import resnet50

    net = resnet50()
    net.fc = nn.Identity()
    return net


def gpt124m():
    """The layers of a language model of GPT-2's size."""
    from torch import nn

    width, layers = 768, 12

    def block() -> list[nn.Module]:
        attention = [nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)]
        return [*attention, nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]

    blocks = [module for _ in range(layers) for module in block()]
    return nn.ModuleList([nn.Embedding(50257, width), nn.Embedding(1024, width), *blocks, nn.LayerNorm(width)])


def problem(network: str, tasks: int, device: str):
    """A set-up's parameters and gradients on the device."""
    from benchmarks.common import setups

    setups.NETWORKS.update(resnet50=resnet50, gpt124m=gpt124m)
    return setups.Problem(setups.Setup(network, tasks), device=device)


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
