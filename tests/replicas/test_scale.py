"""Settings of replicas: sorted by whose they are, read from text, refused in a sentence."""

from pathlib import Path

import pytest

from octavo.engine.config import ConfigError
from octavo.server.replicas.scale import FOREIGN, parts_of, scale_table
from octavo.server.settings import ServerSettings


def test_text_of_a_command_line_becomes_what_each_setting_is():
    config, settings, scale = parts_of(
        {
            "model": "123",
            "max-num-seqs": "8",
            "enable_prefix_caching": "false",
            "max_replicas": "3",
            "gpus": "0.5",
            "target_ongoing_requests": "16",
            "served_model_name": "tiny",
            "shutdown_timeout": "60",
        }
    )
    assert (config.model, config.max_num_seqs, config.enable_prefix_caching) == ("123", 8, False)
    assert (scale.max_replicas, scale.gpus, scale.target_ongoing_requests) == (3, 0.5, 16.0)
    assert (settings.served_model_name, settings.shutdown_timeout) == (["tiny"], 60.0)


def test_responses_are_kept_by_one_replica_only():
    assert parts_of({"model": "m"})[1].max_stored_responses > 0
    assert parts_of({"model": "m", "max_replicas": 2})[1].max_stored_responses == 0
    with pytest.raises(ConfigError, match="none knows what another kept"):
        parts_of({"model": "m", "max_replicas": 2, "max_stored_responses": 5})


@pytest.mark.parametrize(
    "args, words",
    [
        ({"max_replica": 2}, "there is no setting `max_replica`"),
        ({"port": 8000}, "`port` belongs to whoever holds the port"),
        ({"max_replicas": 0}, "`max_replicas` must be from 1 to 10000, got 0"),
        ({"max_replicas": "many"}, "`max_replicas` must be int, got 'many'"),
        ({"min_replicas": 3, "max_replicas": 2}, "`max_replicas` is 2, below `min_replicas` 3"),
        ({"max_ongoing_requests": 4}, "no replica would start"),
        ({"max_num_seqs": -1}, "max_num_seqs"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(args, words):
    with pytest.raises(ConfigError) as caught:
        parts_of({"model": "m", **args})
    assert words in str(caught.value)


def test_every_setting_that_is_left_to_the_proxy_is_one_of_the_endpoint():
    assert FOREIGN <= {*ServerSettings.__dataclass_fields__}


def test_the_table_of_the_page_is_the_one_the_code_makes():
    page = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text()
    table = page.split("<!-- settings -->\n")[1].split("<!-- /settings -->")[0]
    assert table == scale_table(), "run python scripts/write_settings_table.py"
