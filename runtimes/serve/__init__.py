"""An OpenAI-compatible server for exported models: `losa serve`.

From the wire inwards: `server` (uvicorn, signals, draining), `app` (routes), `limits` (keys, bodies, errors),
`requests` (what a body may say), `generation` (one answer as it comes), `engine` (continuous batching, in a thread
of its own), `slots` (keys and values of the requests, and the prompts they can share).
"""
