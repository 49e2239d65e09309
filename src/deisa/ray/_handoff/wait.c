/* Waiting: with a limit, with words now and then about whom for, and with an ear for interrupts. */

#define _GNU_SOURCE
#include "client.h"
#include "failure.h"

#include <stdio.h>
#include <time.h>

double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static double least(double one, double other)
{
    return one < other ? one : other;
}

int client_check_interrupt(const handoff_client *client, handoff_error *error)
{
    if (client->options.interrupted != NULL && client->options.interrupted(client->options.context))
        return fail(error, "Interrupted", "a wait was interrupted");
    return 0;
}

void client_pause_for_message(handoff_client *client, void *subject, double seconds)
{
    (void)subject;
    connection_wait(&client->agent, seconds);
}

int client_wait_for(handoff_client *client, const client_wait *wait, handoff_error *error)
{
    const handoff_options *options = &client->options;
    double started = seconds_now(), said = started;
    char text[HANDOFF_TEXT_BYTES];
    while (!wait->done(client, wait->subject)) {
        double now = seconds_now();
        if (now - started >= wait->timeout_s) {
            wait->describe(client, wait->subject, text, sizeof text);
            return fail(error, "WaitTimeoutError", "%s; gave up after %g s (%s sets how long)", text, wait->timeout_s,
                        wait->setting);
        }
        if (now - said >= options->warn_every_s) {
            said = now;
            wait->describe(client, wait->subject, text, sizeof text);
            if (*client->down)
                client_say(client, HANDOFF_WARNING, "%s (%.0f s so far); %s, and no other has come yet", text, now - started,
                           client->down);
            else
                client_say(client, HANDOFF_WARNING, "%s (%.0f s so far)", text, now - started);
        }
        double pause = least(wait->timeout_s - (now - started), options->warn_every_s - (now - said));
        wait->pause(client, wait->subject, least(pause > 0 ? pause : 0, PAUSE_S));
        if (client_check_interrupt(client, error) < 0 || client_receive(client, error) < 0)
            return -1;
    }
    return 0;
}
