"""The gRPC door, for the Shepherd Model Gateway: token ids in, token ids out, over the same engine as HTTP.

The service is `tokenspeed.grpc.scheduler.TokenSpeedScheduler` of the package `smg-grpc-proto` (the extra `smg`). The
gateway renders templates, tokenizes, detokenizes and parses; a request is `asked`, its answer `told`.
"""
