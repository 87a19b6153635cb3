"""Settings of an endpoint: fields from a config, addresses, keys that are put where a name belongs."""

import json

import pytest

from pasta_jax.config import Config, sections, with_changes
from pasta_jax.utils.endpoint import Endpoint, EndpointError
from pasta_jax.utils.protocols import Call


def test_every_field_of_a_section_arrives():
  settings = dict(
    kind="gemini", url="http://u", model="m", key_env="K", max_tokens=7, concurrency=2, retries=3
  )
  judge = sections.Judge(**settings, timeout=1.5, logprobs=False)
  assert Endpoint.from_config(judge, part="judge") == Endpoint(
    **settings, timeout=1.5, logprobs=False, part="judge"
  )
  annotate = sections.Annotate(**settings, timeout=2.5, per_minute=9)
  assert Endpoint.from_config(annotate, part="annotate", logprobs=False) == Endpoint(
    **settings, timeout=2.5, logprobs=False, per_minute=9, part="annotate"
  )
  with pytest.raises(EndpointError, match="^annotate: concurrency"):
    Endpoint("m", retries=-1, part="annotate")


def test_the_identity_of_a_call_is_that_of_released_versions():
  """Files of paid calls stay useful."""
  messages = Call([{"role": "system", "content": "s"}, {"role": "user", "content": "é"}])
  assert Endpoint("m", url="http://h/v1/").identity(messages) == "30cedc60aafa2821389afe248077ee2e"
  assert Endpoint("m", kind="gemini", logprobs=False).identity(messages) == "987299dd0440b138aa4dc19ed5e7b1d4"


@pytest.mark.parametrize(
  "url", ["localhost:8000/v1", "http://", "http://me:se/cret@host", "http://me:secret@host:port", "http://[::1", "ftp://h"]
)  # fmt: skip
def test_addresses(url):
  with pytest.raises(EndpointError, match="^judge.url must be an address such as http") as error:
    Endpoint("m", url=url)
  assert ("not " in str(error.value)) == ("@" not in url) and "cret" not in str(error.value)


@pytest.mark.parametrize(
  "key",
  [
    "sk-proj-0123456789abcdef",
    "AIzaSyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q",
    "hf_abcdefGHIJKLmnopqrsTUVWXYZabcdefgh",
    "gsk_a1b2c3d4e5f6g7h8i9j0",
    "0123abcd",
    "d41d8cd98f00b204e9800998ecf8427e",
    "$OPENAI_API_KEY",
  ],
)
def test_a_key_in_place_of_its_variable_is_refused_and_not_shown(key):
  for section in ("judge", "annotate"):
    with pytest.raises(ValueError, match=rf"^{section}.key_env must be the name of an environment") as error:
      with_changes(Config(), {f"{section}.key_env": key})
    assert key not in str(error.value)


def test_names_of_variables_and_logins_in_files():
  for name in (
    "",
    "OPENAI_API_KEY",
    "MY_ORGANISATIONS_AZURE_KEY_2",
    "my_openai_key_2025",
    "OPENROUTERAPIKEYNUMBERONE",
  ):
    config = with_changes(Config(), {"judge.key_env": name, "judge.url": "https://me:secret@host/@v1"})
  assert config.judge.url == "https://me:secret@host/@v1"
  assert json.loads(config.to_json())["judge"]["url"] == "https://host/@v1"
