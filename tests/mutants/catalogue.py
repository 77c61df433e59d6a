"""The mutants. A promise without one may be broken without anybody noticing."""

# ruff: noqa: E501  # lines of the package stand here as they are
from __future__ import annotations

from tests.mutants.mutant import Chaos, Mutant, NamedTest

ENGINE = "tests/engine/test_engine.py::"
LIFE = "tests/engine/test_lifecycle.py::"
FAULTS = "tests/testing/test_engine_faults.py::"
SERVER = "tests/server/"
KILLS = "--kinds worker.kill --faults 4 --bursts 0 --streams 4"

MUTANTS = (
    # --- streams -------------------------------------------------------------------------------------
    Mutant(
        "a token dropped after a loss",
        "no token is lost",
        "engine/output.py",
        "        self.read += len(new)\n",
        "        self.read += len(new) + (self.record.crashes > 0)\n",
        (
            NamedTest(f"{ENGINE}test_a_dead_worker_costs_a_pause_and_no_token"),
            Chaos(KILLS, "characters, not|from character"),
        ),
    ),
    Mutant(
        "a token doubled after a loss",
        "no token comes twice",
        "engine/output.py",
        "        new = record.token_ids[self.read :]\n",
        "        new = record.token_ids[max(0, self.read - (record.crashes > 0)) :]\n",
        (
            NamedTest(f"{ENGINE}test_a_dead_worker_costs_a_pause_and_no_token"),
            Chaos(KILLS, "characters, not|from character"),
        ),
    ),
    Mutant(
        "a resumed request draws other tokens",
        "a request goes on after a loss as it would have",
        "actors/scheduler.py",
        "        params=record.params,\n",
        "        params=__import__('dataclasses').replace(record.params, seed=record.params.seed + record.crashes),\n",
        (Chaos(KILLS, "from character"),),
    ),
    Mutant(
        "two finish reasons",
        "each choice ends once",
        "server/routes/service.py",
        "                    await stream.write(events)\n",
        "                    await stream.write(events if output.finish_reason is None else events * 2)\n",
        (
            NamedTest(f"{SERVER}test_chat.py::test_stream_begins_with_the_role_and_ends_with_the_reason"),
            Chaos(KILLS, "finish reasons|goes on after its end"),
        ),
    ),
    Mutant(
        "no end of the stream",
        "a stream ends with [DONE]",
        "server/api/answers.py",
        "            return DONE\n",
        '            return b""\n',
        (NamedTest(f"{SERVER}test_completions.py::test_stream"),),
    ),
    Mutant(
        "silence without comments",
        "a stream says now and then that it is alive",
        "server/http/sse.py",
        'KEEP_ALIVE = b": keep-alive\\n\\n"\n',
        'KEEP_ALIVE = b""\n',
        (NamedTest(f"{SERVER}test_keep_alive.py::test_a_comment_for_each_silence"),),
    ),
    # --- usage and log probabilities -----------------------------------------------------------------
    Mutant(
        "the prompt's tokens grow with each resumption",
        "usage counts a prompt once",
        "server/routes/outputs.py",
        "        prompt = sum(map(len, self._submission.prompts))\n",
        "        prompt = sum(map(len, self._submission.prompts)) + self._engine.statistics().requests_resumed_total\n",
        (Chaos(KILLS, "prompt tokens, not"),),
    ),
    Mutant(
        "tokens counted twice",
        "usage counts what came",
        "server/routes/outputs.py",
        "        completion = sum(self._generated_tokens.values())\n",
        "        completion = 2 * sum(self._generated_tokens.values())\n",
        (NamedTest(f"{SERVER}test_completions.py::test_unary"),),
    ),
    Mutant(
        "log probabilities shifted",
        "log probabilities are those of their tokens",
        "engine/output.py",
        "        logprobs = record.logprobs[max(0, first) : max(0, last)]\n",
        "        logprobs = record.logprobs[max(0, first - 1) : max(0, first - 1) + len(new)]\n",
        (
            NamedTest(f"{FAULTS}test_log_probabilities_are_those_of_their_tokens"),
            Chaos(KILLS, "log probabilit"),
        ),
    ),
    Mutant(
        "log probabilities shifted after a loss",
        "log probabilities are those of their tokens, whatever was lost",
        "engine/output.py",
        "        logprobs = record.logprobs[max(0, first) : max(0, last)]\n",
        "        shift = record.resumed_at > 0\n"
        "        logprobs = record.logprobs[max(0, first - shift) : max(0, first - shift) + len(new)]\n",
        (
            NamedTest(f"{FAULTS}test_log_probabilities_are_those_of_their_tokens"),
            Chaos(KILLS, "log probabilit"),
        ),
    ),
    # --- failing -------------------------------------------------------------------------------------
    Mutant(
        "refused for ever after the third loss",
        "a request is refused only while there is no room",
        "actors/router.py",
        "        self._limits.check(len(self._records), choices, tokens)\n",
        "        lost = sum(record.up.incarnation for record in self._replicas.values()) > 3\n"
        "        self._limits.check(10_000 if lost else len(self._records), choices, tokens)\n",
        (Chaos(KILLS, "without cause"),),
    ),
    Mutant(
        "faults are decided, counted, and never carried out",
        "what was fired has its effect",
        "actors/transports/faulty.py",
        "                await self._inner.send(Inject(firing.action, firing.fault.duration))\n",
        "                await trio.lowlevel.checkpoint()\n",
        (
            NamedTest(f"{FAULTS}test_no_token_is_lost"),
            Chaos("--kinds plan.step-crash,plan.step-exit --faults 4", "had no effect"),
        ),
    ),
    Mutant(
        "a loss costs 12 s more",
        "a loss costs a short pause",
        "actors/worker_group.py",
        "        if self._failed_starts:\n",
        "        await trio.sleep(12.0 * (self.restarts > 0))\n        if self._failed_starts:\n",
        (
            NamedTest(f"{FAULTS}test_a_loss_costs_a_moment"),
            Chaos(f"{KILLS} --seconds 120", "VIOLATED.*no stream silent"),
        ),
    ),
    Mutant(
        "a worker that hangs is found late",
        "a hang is found within the step timeout",
        "actors/worker_group.py",
        "                WorkerRank(transport, self._config.step_timeout)\n",
        "                WorkerRank(transport, 10 * self._config.step_timeout)\n",
        (NamedTest(f"{FAULTS}test_a_hang_is_found_within_the_step_timeout"),),
    ),
    Mutant(
        "a request that kills its workers is tried for ever",
        "a poisoned request fails alone",
        "scheduling/request.py",
        "        return self.crashes >= SUSPECT_AFTER\n",
        "        return False\n",
        (NamedTest(f"{ENGINE}test_one_poisoned_request_fails_alone"),),
    ),
    Mutant(
        "a router forgets its requests",
        "a router that fails has its requests when it is back",
        "actors/router.py",
        "        for record in list(self._records.values()):\n            self._withdraw(record)\n            self._requeue(record)\n",
        "        for record in list(self._records.values()):\n            self._withdraw(record)\n            self._fail(record, RequestTooLarge('forgotten'))\n",
        (NamedTest(f"{ENGINE}test_a_failing_router_is_restarted_with_its_records"),),
    ),
    # --- stopping ------------------------------------------------------------------------------------
    Mutant(
        "a drain that does not wait",
        "a drain lets admitted requests finish",
        "engine/stop.py",
        "                await self._router.wait_idle()\n                await self._readers.wait_none()\n",
        "                await trio.lowlevel.checkpoint()\n",
        (NamedTest(f"{ENGINE}test_a_drain_lets_admitted_requests_finish"),),
    ),
    Mutant(
        "a drain without an end",
        "a drain ends at its deadline, with what there is",
        "engine/stop.py",
        "        self._draining.deadline = min(self._draining.deadline, now + stop_budget.drain_seconds(seconds))\n",
        "",
        (NamedTest(f"{ENGINE}test_the_deadline_ends_a_drain_with_what_there_is"),),
    ),
    Mutant(
        "a second signal is as the first one",
        "a second signal cuts the drain short",
        "engine/stop.py",
        "        self.request(0.0, by)\n        self._draining.cancel()\n",
        "        self.request(None, by)\n",
        (NamedTest(f"{ENGINE}test_a_drain_can_be_cut_short"),),
    ),
    Mutant(
        "a stop waits until the model is loaded",
        "a stop while the model loads is quick",
        "engine/stop.py",
        "            self.starting.cancel()\n",
        "            pass\n",
        (NamedTest(f"{ENGINE}test_a_stop_while_loading_is_quick"),),
    ),
    # --- exit codes ----------------------------------------------------------------------------------
    Mutant(
        "a failed engine exits with 0",
        "exit code 70 says that the engine has failed",
        "engine/shutdown_report.py",
        "            return EXIT_FAILED\n",
        "            return EXIT_OK\n",
        (NamedTest("tests/engine/test_shutdown_report.py::test_exit_codes"),),
    ),
    Mutant(
        "what is left behind is not told",
        "exit code 71 says that something was left behind",
        "engine/shutdown_report.py",
        "        return EXIT_ABANDONED if self.abandoned else EXIT_OK\n",
        "        return EXIT_OK\n",
        (NamedTest("tests/engine/test_shutdown_report.py::test_exit_codes"),),
    ),
    # --- sleeping ------------------------------------------------------------------------------------
    Mutant(
        "a sleep that keeps its memory",
        "asleep, the workers have given their memory back",
        "engine/lifecycle.py",
        "        self.given_back = await self._pause_or_stop(level)\n",
        "        self.given_back = await self._pause_or_stop(0)\n",
        (NamedTest(f"{LIFE}test_it_sleeps_wakes_and_says_the_same"),),
    ),
    Mutant(
        "kept requests are aborted",
        "requests that a sleep keeps go on after it",
        "engine/lifecycle.py",
        '        if mode == "abort":\n            self._router.finish_old("abort")\n        if mode == "keep":\n',
        '        if mode != "wait":\n            self._router.finish_old("abort")\n        if mode == "keep":\n',
        (NamedTest(f"{LIFE}test_keep_goes_on_after_the_wake"),),
    ),
    Mutant(
        "a sleep waits for nobody",
        "requests in flight end before it falls asleep",
        "engine/lifecycle.py",
        "            while self._router.live > self._router.held:\n",
        "            while False:\n",
        (NamedTest(f"{LIFE}test_wait_lets_requests_end_first"),),
    ),
    Mutant(
        "a refusal of what would wake it",
        "a request wakes the engine",
        "engine/lifecycle.py",
        "        return self.state == AWAKE or self._current.config.wake_on_request\n",
        "        return self.state == AWAKE\n",
        (NamedTest(f"{LIFE}test_a_request_wakes_it"),),
    ),
    # --- probes --------------------------------------------------------------------------------------
    Mutant(
        "ready without a replica",
        "ready means that requests are served",
        "engine/view.py",
        "        ready = running and sleep.registered and (up or sleep.state != AWAKE)\n",
        "        ready = running and sleep.registered\n",
        (NamedTest(f"{FAULTS}test_probes_tell_what_is"),),
    ),
    Mutant(
        "ready while it drains",
        "a draining engine is not ready",
        "engine/view.py",
        "        ready = running and sleep.registered and (up or sleep.state != AWAKE)\n",
        "        ready = sleep.registered and (up or sleep.state != AWAKE)\n",
        (NamedTest(f"{FAULTS}test_probes_tell_what_is"),),
    ),
    Mutant(
        "a probe that is always content",
        "a probe's status says what its body says",
        "server/routes/probes.py",
        "    return json_response(Liveness(status, health.state), 200 if good else 503)\n",
        "    return json_response(Liveness(status, health.state), 200)\n",
        (NamedTest(f"{SERVER}test_service.py::test_an_engine_that_is_draining"),),
    ),
    # --- leaks ---------------------------------------------------------------------------------------
    Mutant(
        "a client that leaves is not noticed",
        "a request ends when its client leaves",
        "engine/generation.py",
        "        self.abort()\n        self._admission.leave()\n",
        "        self._admission.leave()\n",
        (
            NamedTest(f"{ENGINE}test_leaving_early_frees_the_blocks"),
            Chaos("--kinds client --faults 4", "VIOLATED.*a client that leaves is noticed"),
        ),
    ),
    Mutant(
        "a descriptor lost with each loss",
        "nothing is left of a lost worker",
        "actors/transports/process.py",
        "                self.kill()\n            await self._wait_gone(stop_budget.PROCESS_EXIT)\n            for",
        "                self.kill()\n            os.dup(0)\n            await self._wait_gone(stop_budget.PROCESS_EXIT)\n            for",
        (Chaos(KILLS, "VIOLATED.*no more open files"),),
    ),
    Mutant(
        "a worker outlives its engine",
        "no worker outlives the engine's process",
        "worker/main.py",
        "        os._exit(1)  # the parent is gone; nobody would read what is flushed\n",
        "",
        (
            NamedTest(
                "tests/actors/transports/test_process.py::"
                "test_reader_alone_ends_an_orphan_where_there_is_no_lifeline"
            ),
        ),
    ),
    # --- supervision ---------------------------------------------------------------------------------
    Mutant(
        "a job is lost with its process",
        "a job whose process is lost is begun again by another",
        "supervision/pool.py",
        "            self.queue.appendleft(job)\n",
        "",
        (
            NamedTest(
                "tests/supervision/test_pool.py::"
                "test_a_job_whose_process_is_lost_is_done_by_another_before_all_others"
            ),
        ),
    ),
    Mutant(
        "a failure without its cause",
        "a failure says who and why",
        "supervision/hooks.py",
        '    values = {**names, "cause": describe(error)}\n',
        '    values = {**names, "cause": type(error).__name__}\n',
        (NamedTest("tests/supervision/test_failure_messages.py"),),
    ),
    # --- the harness itself --------------------------------------------------------------------------
    Mutant(
        "a check of tokens that is always content",
        "ullm.testing's assertions fail where something is wrong",
        "testing/assertions.py",
        "    expected, got = list(expected), list(got)\n    if expected == got:\n        return\n",
        "    return\n",
        (NamedTest("tests/testing/test_assertions.py"),),
    ),
    Mutant(
        "leaks that nobody sees",
        "ullm_no_leaks names what a test leaves",
        "testing/leaks.py",
        "        return left + self._new_descriptors(len(self._trackers() - self._children))\n",
        "        return []\n",
        (NamedTest("tests/testing/test_leaks.py::test_what_is_left_is_named"),),
    ),
)
