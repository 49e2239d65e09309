/* Numbers of the protocol. Written by `python -m deisa.ray._transport.header`; do not edit. */

#ifndef DEISA_HANDOFF_PROTOCOL_H
#define DEISA_HANDOFF_PROTOCOL_H

#define PROTOCOL_VERSION 7
#define PROTOCOL_MAX_MESSAGE_BYTES 16777216
#define PROTOCOL_MAX_ITEMS 100000
#define PROTOCOL_MAX_TEXT 2000
#define PROTOCOL_MAX_DIMENSIONS 64
#define PROTOCOL_MAX_LIMITS 64
#define PROTOCOL_MAX_DESCRIPTORS 253
#define PAGE_LAYOUT_VERSION 2
#define PAGE_NO_TIME INT64_C(0x7FF8000000000000)
#define PAGE_MAGIC_SLOT_TABLE "deisaSLT"
#define PAGE_MAGIC_ARRIVAL_COUNTERS "deisaCNT"
#define PAGE_MAGIC_SUBMISSION_RING "deisaRNG"
#define PAGE_MAGIC_FEEDBACK "deisaFBK"
#define PAGE_MAGIC_QUESTIONS "deisaQST"
#define FEEDBACK_MAX_KEYS 256
#define FEEDBACK_MAX_ASKED_KEYS 512
#define FEEDBACK_MAX_KEY_BYTES 255
#define FEEDBACK_MAX_QUEUE_SIZE 65536

/* Codes of messages. */
enum {
    MESSAGE_HELLO = 1,
    MESSAGE_CANNOT_JOIN = 13,
    MESSAGE_DECLARE_DTYPE = 2,
    MESSAGE_NOTIFY = 3,
    MESSAGE_CLOSE = 4,
    MESSAGE_ABORT = 5,
    MESSAGE_ENDING = 6,
    MESSAGE_ATTACH = 7,
    MESSAGE_FOLLOW = 8,
    MESSAGE_RELEASE = 9,
    MESSAGE_PROPOSE = 10,
    MESSAGE_SETTLE = 11,
    MESSAGE_FINISH = 12,
    MESSAGE_PROGRESS = 16,
    MESSAGE_SLOTS = 17,
    MESSAGE_START = 18,
    MESSAGE_FAIL = 19,
    MESSAGE_ANALYTICS_DOWN = 20,
    MESSAGE_ANALYTICS_UP = 21,
    MESSAGE_LATER = 22,
    MESSAGE_ATTACHED = 24,
    MESSAGE_JOURNAL = 25,
    MESSAGE_EVENTS = 26,
    MESSAGE_JUDGED = 27,
};

/* Tags of values. */
enum {
    VALUE_NONE = 0,
    VALUE_BOOL = 1,
    VALUE_INT = 2,
    VALUE_FLOAT = 3,
    VALUE_COMPLEX = 4,
    VALUE_TEXT = 5,
    VALUE_BYTES = 6,
    VALUE_LIST = 7,
    VALUE_DICT = 8,
    VALUE_ARRAY = 9,
};

/* Words of the header of every page. */
enum {
    PAGE_MAGIC = 0,
    PAGE_VERSION = 1,
    PAGE_FIRST = 2,
    PAGE_IN_USE = 3,
    PAGE_HEADER_WORDS = 8,
};

/* Words of a row of the slot table. */
enum {
    TABLE_GRANTED = 0,
    TABLE_WAKE = 1,
    TABLE_SLOTS = 2,
};

/* Words of the header of the arrival counters. */
enum {
    COUNTERS_NOTIFIED = 4,
};

/* Words of an entry of the arrival counters. */
enum {
    ENTRY_WHOLE = 0,
    ENTRY_PASSED = 1,
    ENTRY_WORDS = 2,
};

/* Words of the submission ring. */
enum {
    RING_CAPACITY = 4,
    RING_SUBMITTED = 5,
    RING_PASSED = 6,
    RING_BLOCKED = 7,
    RING_ENTRIES = 8,
};

/* Words of an entry of the submission ring. */
enum {
    RING_ENTRY_REGION = 0,
    RING_ENTRY_TIMESTEP = 1,
    RING_ENTRY_ROWS = 2,
    RING_ENTRY_TIME = 3,
    RING_ENTRY_WORDS = 4,
};

/* Words of the feedback page. */
enum {
    FEEDBACK_CHANGES = 4,
    FEEDBACK_WAKE = 5,
    FEEDBACK_FINISHED = 6,
    FEEDBACK_ROWS = 7,
    FEEDBACK_CLOSED_KEY = 8,
    FEEDBACK_CLOSED_TIMESTEP = 9,
    FEEDBACK_QUEUE_SIZE = 10,
    FEEDBACK_VALUES = 11,
    FEEDBACK_FIRST_ROW = 12,
};

/* Words of a key's row there. */
enum {
    KEY_HASH = 0,
    KEY_DROPPED = 1,
    KEY_COUNT = 2,
    KEY_LENGTH = 3,
    KEY_BYTES = 4,
    KEY_ENTRIES = 36,
};

/* Words of a value's entry in such a row. */
enum {
    ANSWER_TIMESTEP = 0,
    ANSWER_FIRST = 1,
    ANSWER_LENGTH = 2,
    ANSWER_WORDS = 3,
};

/* Words of the header of the questions page. */
enum {
    QUESTIONS_WAITED = 4,
};

/* Words of an entry of a bridge's row there. */
enum {
    ASKED_HASH = 0,
    ASKED_TIMESTEP = 1,
    ASKED_WORDS = 2,
};

#endif
