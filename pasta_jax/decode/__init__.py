"""Decoding: the interpreter of PASTA-LANG, which runs on the device.

Read in this order: settings, threads, state, step (with attention, guard, limits, sampling), interpreter (the
compiled programs), scheduler (the host's loop: requests, batches, streaming; the door for a server), trace
and record (what came out), generator (`Model`: from text to a response), command (`--mode=decode`). `views`
draws traces.
"""
