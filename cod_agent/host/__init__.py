"""Agents as a service: `cod host`.

    settings   how it is set up: flags, environment, a TOML file
    inbox      what was accepted and is not begun, on disk
    lines      the queue of each run
    service    many agents, one memory, one model; no HTTP here
    views      what clients may look at
    events     what happens, as server-sent events
    schema     what goes over the wire; openapi says it to clients
    app        routes and the guard in front of them
    server     the process: bind, serve, drain

Nothing here is needed to embed an agent in an application: that is `CoDAgent` itself.
"""
