"""How many prompts begin in one step."""

from octavo.engine.core import EngineCore
from tests.engine.tiny import Client, begin_anew, prompt


def test_a_step_begins_as_many_prompts_as_its_plan_has_chunks(llama: EngineCore) -> None:
    core = begin_anew(llama)
    client = Client(core)
    for n in range(8):
        client.add(prompt(2 + n % 2), max_tokens=4)
    begun = []
    while core.has_work():
        client.turn()
        begun.append(8 - len(core.host.free_slots))
    assert core.limits.dims.chunks == 5
    assert begun[:2] == [5, 8]
