"""Under torchrun: rank 1 makes a user's mistake alone, while rank 0 waits in a collective."""

import sys

from samtune.engine import distributed
from samtune.errors import EXIT_CRASH, EXIT_USER_ERROR, UserError

if __name__ == "__main__":
    process = distributed.start(timeout_minutes=1)
    distributed.barrier()
    try:
        if process.rank == 1:
            raise UserError("this image is broken")
        distributed.barrier()
    except UserError as error:
        if distributed.first_to_fail():
            print(error, flush=True)
        sys.exit(EXIT_USER_ERROR)
    except RuntimeError as error:  # gloo: the connection was closed by its peer
        if distributed.first_to_fail():
            print(error, flush=True)
        sys.exit(EXIT_CRASH)
    finally:
        distributed.shutdown()
