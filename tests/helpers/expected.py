"""What tests expect of refusals."""

import pytest

from ptglab import data
from ptglab.errors import InputError


def refused(*words, call=data.load):
    """Return a function that calls `call` and asserts that it is refused in one line with all of `words`."""

    def check(*args, **kwargs):
        with pytest.raises(InputError) as caught:
            call(*args, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        assert [word for word in words if word not in message] == [], message

    return check
