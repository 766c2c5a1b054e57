"""Adapters on any PyTorch model: attach, train, merge, detach; the base stays as it is, to the bit."""

import torch

import twofold

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
before = [p.clone() for p in model.parameters()]

print(twofold.attach(model, twofold.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"])))

x = torch.randn(256, 8)
y = x.prod(dim=1, keepdim=True).tanh()
trained = [p for p in model.parameters() if p.requires_grad]
optimiser = torch.optim.AdamW(trained, lr=1e-2)
for _step in range(200):
    loss = torch.nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()

with twofold.disabled(model):
    print(f"loss of the base {torch.nn.functional.mse_loss(model(x), y):.4f}, with the adapter {loss:.4f}")

apart = model(x)
twofold.merge(model)
print(f"merged differs by at most {(model(x) - apart).abs().max():.1e}")
twofold.unmerge(model)
twofold.detach(model)
print("base unchanged:", all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
