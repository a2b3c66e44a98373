import functools

import pytest

from cloud_hub.identity import issue
from cloud_hub.identity.passwords import hash_password


@pytest.fixture(scope="module")
def quick_logins():
    """Fifty accounts and logins at full cost would take half a minute; `test_tls.py` pays the real price."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(issue, "hash_password", functools.partial(hash_password, iterations=1000))
        yield
