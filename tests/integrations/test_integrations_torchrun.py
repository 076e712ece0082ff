"""Frameworks in two real processes: their own `DistributedDataParallel`, which the session finds by itself."""

import ast
import os
import subprocess
import sys

import pytest
from places import PYTHONPATH

END = """
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
bytes_sent = callback.session.gradient_bytes
end = (callback.plan.R, callback.plan.switch_step, callback.session.clock.step, callback.session.notes, digest, bytes_sent)
sys.stdout.write(f"END {end}\\n")  # at once: print writes piece by piece, between the pieces of the other process
sys.stdout.flush()
"""
SCRIPTS = {
    "lightning": """
from lightning_runs import SOON, Classifier, LowRankCallback, loader, L
model, callback = Classifier(), LowRankCallback(SOON{module})
L.Trainer(callbacks=[callback], accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, logger=False, enable_checkpointing=False,
          enable_progress_bar=False, enable_model_summary=False).fit(model, loader())
""",
    "transformers": """
from transformer_runs import trainer_of
trainer, callback = trainer_of("run", ddp_backend="gloo")
trainer.train()
model = trainer.model
""",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("framework", "module", "pairs", "steps"),
    [("lightning", "", 2, 12), ("lightning", ', module="net"', 2, 12), ("transformers", "", 13, 8)],
)
def test_both_processes_end_with_the_same_model(framework, module, pairs, steps, tmp_path):
    pytest.importorskip(framework)
    text = "import hashlib, sys\n" + SCRIPTS[framework].replace("{module}", module) + END
    (tmp_path / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc_per_node", "2", "script.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        ast.literal_eval(line.partition("END ")[2]) for line in done.stdout.splitlines() if line.startswith("END ")
    )
    assert first == second
    ranks, switch, step, notes, _, sent = first
    assert len(ranks) == pairs and (switch, step, notes) == (steps // 2, steps, [])
    assert sent["low-rank"] < sent["full-rank"]
