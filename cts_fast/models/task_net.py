"""The form of every network that is meta-learned: a shared `body` and a `head` that belongs to one task."""

from torch import Tensor, nn


class TaskNet(nn.Module):
    """logits = head(body(x)): the body's parameters are meta-learned, the linear head is the task's own."""

    def __init__(self, body: nn.Module, features: int, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.body = body
        self.head = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))
