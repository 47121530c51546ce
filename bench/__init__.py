"""What is measured, one script a subject: ``python -m bench.NAME`` prints a table and writes bench/results/NAME.json.

The peers come with the extra: ``pip install -e .[bench]``. A figure means something only on a machine that does
nothing else. ``--quick`` runs a script through in a minute or so, to see that it works, and writes nothing.
"""
