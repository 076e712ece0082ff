"""Train, switch, export to ONNX, run by onnxruntime, compare.

python examples/onnx_export.py    (needs onnx, onnxscript, onnxruntime and scikit-learn)
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch

import fxrank
from fxrank.demo import DigitsNet, digits

torch.manual_seed(0)
train, val = digits()
model = DigitsNet(width=16)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
policy = fxrank.Cuttlefish(objective="size")  # leave it out, and pairs must be faster as well
result = fxrank.auto_lowrank(
    model, train, epochs=4, val_loader=val, optimizer=optimizer, scheduler=scheduler, policy=policy
)
print(result.report.summary())

model.eval()
images, labels = next(iter(val))
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "digits.onnx")
    # Exported with a batch of 8; any size may come later. Each pair is two operators in the file.
    torch.onnx.export(
        model, (images[:8],), path, dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    size = sum(file.stat().st_size for file in Path(folder).iterdir())

outputs = torch.from_numpy(outputs)
with torch.no_grad():
    difference = (outputs - model(images)).abs().max()
print(f"{size / 1000:.0f} kB, largest difference of {len(images)} outputs {difference:.1e}")
print(f"onnxruntime reads {(outputs.argmax(1) == labels).float().mean():.2%} of the validation images")
