"""From a recipe to a verified merge: recipe -> plan -> streaming execution -> verification.

`recipe` reads what was asked, `plan` resolves it tensor by tensor, `stream` writes the shards, `execute` makes
the folder whole (companions, manifest, verification, one rename), `job` is what background jobs call.
"""
