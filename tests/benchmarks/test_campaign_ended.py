"""A campaign that is terminated takes its cells with it."""

import os
import signal
import subprocess
import sys
import time

import pytest
from places import ROOT


@pytest.mark.skipif(sys.platform == "win32", reason="no process groups")
def test_no_cell_goes_on_alone(tmp_path):
    options = ["--data", str(tmp_path), "--cache", str(tmp_path), "--jobs", "wide-digits", "--rows", "full", "--small"]
    command = [sys.executable, "-m", "benchmarks.decisions", *options, "--ledger", str(tmp_path / "ledger.jsonl")]
    campaign = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert campaign.stdout is not None
    try:
        assert "begins: wide-digits full 0" in campaign.stdout.readline()
        time.sleep(0.5)  # until the campaign waits for it
        campaign.send_signal(signal.SIGTERM)  # a shell in the background ignores the other one
        said, _ = campaign.communicate(timeout=60)
        assert "stopped; the same command goes on from here" in said
        time.sleep(0.1)
        with pytest.raises(ProcessLookupError):
            os.killpg(campaign.pid, 0)
    finally:
        if campaign.poll() is None:
            os.killpg(campaign.pid, signal.SIGKILL)
