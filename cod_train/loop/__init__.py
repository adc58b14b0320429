"""The loop: deploy agents, record, train, gate, serve, and deploy again, round after round.

    cod loop --config cpu_tiny --out runs/loop --rounds 6

`settings` says what a loop does, `rounds` what it has done, `stages` does the next of it, `children` are the commands it
runs beside itself, `view` shows it while it happens, `report` tells it afterwards. docs/loop.md draws it.
"""
