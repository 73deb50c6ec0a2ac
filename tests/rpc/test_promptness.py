"""What the server knows of the connections that it gives room to."""

from gramophone_server.rpc.promptness import MAX_KNOWN, SLOW_S, Promptness, Standing


def test_a_connection_is_prompt_when_it_has_used_its_room():
    promptness = Promptness()
    assert promptness.of("a", 0) is Standing.UNKNOWN
    promptness.was_prompt("a")
    assert promptness.of("a", 0) is Standing.PROMPT and promptness.of("b", 0) is Standing.UNKNOWN


def test_one_that_kept_others_waiting_is_slow_for_a_while_whatever_else_it_does():
    promptness = Promptness()
    promptness.was_prompt("a")
    promptness.was_slow("a", 100)
    promptness.was_prompt("a")
    assert promptness.of("a", 100 + SLOW_S - 1) is Standing.SLOW
    assert promptness.of("a", 100 + SLOW_S) is Standing.PROMPT


def test_it_knows_a_bounded_number_of_connections():
    promptness = Promptness()
    for number in range(2 * MAX_KNOWN):
        promptness.was_prompt(f"prompt {number}")
        promptness.was_prompt("a")
        promptness.was_slow(f"slow {number}", number)
    assert promptness.of("prompt 0", 0) is Standing.UNKNOWN and promptness.of("a", 0) is Standing.PROMPT
    assert promptness.of("slow 0", 0) is Standing.UNKNOWN
    last = 2 * MAX_KNOWN - 1
    assert promptness.of(f"prompt {last}", 0) is Standing.PROMPT and promptness.of(f"slow {last}", 0) is Standing.SLOW
