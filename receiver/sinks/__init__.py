"""Where events go: each module is one kind of `receiver.notify.Sink`."""
