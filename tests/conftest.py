"""Shared fixtures: one Ray and one S3 server a test process, the shared real images."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

for key, value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(key, value)
os.environ.pop("RAY_ADDRESS", None)

S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
"""Ends with whoever started it: then its standard input is closed."""
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images beside the project; tests that need it are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip("the shared real images are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[None]:
    """One real Ray for the whole session: four logical CPUs, whatever the machine has.

    Workers inherit this process's environment when Ray starts, so the S3 server's must be there by then.
    """
    from raysynth.stages import cluster

    import ray  # isort: skip

    ray.init(
        address="local", num_cpus=4, include_dashboard=False, object_store_memory=384 << 20,
        logging_level="error", log_to_driver=False, _temp_dir=tempfile.mkdtemp(prefix="rs", dir="/tmp"),
    )  # fmt: skip
    cluster.quiet_data_context()
    ray.data.DataContext.get_current().execution_no_progress_timeout_s = 60
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A moto S3 server in its own process; its URL and throw-away credentials are in the environment."""
    server = subprocess.Popen(
        [sys.executable, "-c", S3_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert server.stdout is not None
    url = server.stdout.readline().strip()  # once it listens
    assert url, "the S3 test server did not start"
    os.environ.update(
        AWS_ENDPOINT_URL=url, AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )  # fmt: skip
    yield url
    server.terminate()
    server.wait(10)


@pytest.fixture
def s3_root(s3_server: str) -> str:
    """A fresh bucket's prefix, as an experiment's `root`."""
    import s3fs

    bucket = f"b{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3_server, skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/runs"


@pytest.fixture(params=["local", "s3"])
def any_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same test on local disk and on S3."""
    return str(tmp_path / "runs") if request.param == "local" else request.getfixturevalue("s3_root")


@pytest.fixture
def own_kernels() -> Iterator[None]:
    """torch's own convolutions: oneDNN's bfloat16 ones with one input channel now and then have NaN in a gradient."""
    import torch

    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    yield
    torch.backends.mkldnn.enabled = before
