"""What nobody should send: damaged pictures, bombs, and messages that no client of ours would make.

`python -m tests.bad_input --count 20000 --seed 1` sends them to a server of its own (`make fuzz`), and holds it to this: no crash,
no INTERNAL and no UNKNOWN, no answer later than 2 s, no more memory than `Limits.memory_bytes` says, health checks answered all
the while, and a good picture in the end. `tests/test_bad_input.py` is a sample of it. An input that failed once is kept in
`corpus/` and sent each time; `python -m tests.bad_input --only FILE` sends one alone.
"""
