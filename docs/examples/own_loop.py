"""A training loop of your own whose network grows: scikit-learn's digits, a small CNN, plain PyTorch.

``python own_loop.py [RUN]``, while the stack, a worker, Urza and Tamiyo run (docs/start/tutorial.md starts them).
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import esper
from esper.schemas.lifecycle import ACTIVE_STAGES

NUM_EPOCHS = 14
COPIES = 20  # noisy copies of the training set in one epoch
BATCH_SIZE = 64


class DigitsNet(nn.Module):
    """Maps images (N, 1, 8, 8) to logits (N, 10). It is narrow, so growth has something to add."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.fc1 = nn.Linear(64, 8)
        self.fc2 = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.conv1(x))
        h = nn.functional.max_pool2d(torch.relu(self.conv2(h)), 2)
        return self.fc2(torch.relu(self.fc1(h.flatten(1))))


def add_noise(images: torch.Tensor) -> torch.Tensor:
    """Gaussian noise makes the small data set harder."""
    return images + 0.25 * torch.randn_like(images)


def main() -> None:
    torch.manual_seed(7)
    torch.set_num_threads(1)  # this network is too small for more
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    train, validation = order[450:], order[:450]
    val_images, val_labels = add_noise(images[validation]), labels[validation]

    # 1. Wrap the network. All seeds are dormant: it computes exactly what it computed before.
    model = esper.wrap(DigitsNet(), target_layers=[nn.Conv2d, nn.Linear], seeds_per_layer=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    # 2. Connect. Tamiyo sees this run from here on.
    run_id = sys.argv[1] if len(sys.argv) > 1 else None
    with esper.connect(model, optimizer, run_id=run_id) as run:
        print(f"run {run.run_id}")
        for epoch in range(NUM_EPOCHS):
            for batch in torch.cat([train[torch.randperm(len(train))] for _ in range(COPIES)]).split(BATCH_SIZE):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(add_noise(images[batch])), labels[batch])
                loss.backward()
                optimizer.step()
                run.step()  # 3. After each optimizer step. It never waits for the network.

            model.eval()
            with torch.no_grad():
                accuracy = (model(val_images).argmax(1) == val_labels).float().mean().item()
            model.train()
            run.epoch_completed({"val_accuracy": accuracy})  # 4. After each epoch: the metric that Tamiyo watches.
            num_parameters = sum(p.numel() for p in model.parameters())
            print(f"epoch {epoch + 1:2}  accuracy {accuracy:.3f}  {num_parameters:,} parameters", flush=True)
        print(f"{run.num_adaptations} seeds germinated; at the end:")
        for seed in model.seeds_not_dormant():
            print(f"  {seed.layer_id}:{seed.seed_id} {seed.stage.lower()}, blueprint {seed.blueprint_id}")

    # 5. Keep the network without Esper. Seeds still in progress are removed, permanent ones become plain modules.
    for seed in model.seeds_not_dormant():
        if seed.stage in ACTIVE_STAGES:
            model.apply_transition(model.plan_cull(seed.layer_id, seed.seed_id), step=run.step_number, boundary=0)
    exported = torch.export.export(model.bake().eval(), (val_images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(exported, "grown.pt2")


if __name__ == "__main__":
    main()
