import pytest


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def served(ullm_session_server, ullm_faults):
    """One server for all tests of a worker of xdist, with this test's faults."""
    server = ullm_session_server("--served-model-name", "m")
    with ullm_faults.also_in(server.faults):
        yield server
