"""Training with parameters sharded by FSDP2, in float32 and in mixed precision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.fsdp


@pytest.mark.skipif(not hasattr(torch.distributed.fsdp, "fully_shard"), reason="PyTorch 2.6 has FSDP2 first")
def test_two_processes_learn_what_one_does():
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).with_name("fsdp_ranks.py")
    done = subprocess.run([sys.executable, *command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same losses and weights") == 2
