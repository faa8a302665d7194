// Command pstest serves Google's fake of Pub/Sub, which keeps everything in memory, until it is
// killed. Its argument is the address to listen on.
package main

import (
	"os"
	"time"

	"cloud.google.com/go/pubsub/v2/pstest"
)

func main() {
	// The real service takes deadlines of 10 s and more. Tests do not wait for so long.
	pstest.SetMinAckDeadline(time.Second)
	pstest.NewServerWithAddress(os.Args[1])
	select {}
}
