"""The campaign: hostile inputs of every kind, each judged by the same rules.

`python -m tests.fuzz --cases 2000 --seed 7` makes cases from the seed alone, runs each in a worker
process under limits, and prints what was tried and what was bad. A kind of input is a module with
`prepare`, which writes a case's files, and `run`, which hands them to the product.
"""
