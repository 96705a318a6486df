#!/usr/bin/perl
# Mends one instruction of a QEMU that emulates nested virtualization on AMD's model: mend-qemu.pl PROGRAM. Its tools are nm and readelf.
#
# VMRUN with an interrupt to inject (EVENTINJ) delivers it at once, by do_interrupt_x86_hardirq, and leaves its number in exception_index all
# the same, where exceptions stand that are still to be delivered. The next time that the virtual CPU is asked out of its loop for another
# reason than an exception, the guest gets the interrupt again, even with interrupts disabled. A nested Linux then waits for ever for a lock
# that it holds itself, or meets a triple fault: one of a hundred guests with a thread for each virtual CPU, nearly every one with one thread
# for all. So it is in 10.0 and 11.1. The store is replaced by a no-op; the other kinds of events need theirs.
use strict;
use warnings;

my ($program) = @ARGV;
my %at;
for (`nm -D -S --defined-only '$program'`) {
    $at{$3} = [ hex $1, hex $2 ] if /^([0-9a-f]+) ([0-9a-f]+) T (helper_vmrun|do_interrupt_x86_hardirq)(?:@|$)/;
}
my ( $vmrun, $deliver ) = @at{qw(helper_vmrun do_interrupt_x86_hardirq)};
die "mend-qemu: $program does not have the functions that are known of it\n" unless $vmrun && $deliver;
my ($shift) = map { /^\s+LOAD\s+0x([0-9a-f]+)\s+0x([0-9a-f]+).*\sR E\s/ ? hex($1) - hex($2) : () } `readelf -lW '$program'`;
my ( $start, $size ) = @$vmrun;

open( my $file, '+<:raw', $program ) or die "mend-qemu: $program: $!\n";
seek( $file, $start + $shift, 0 ) or die "mend-qemu: $program: $!\n";
( read( $file, my $code, $size ) // 0 ) == $size or die "mend-qemu: $program ends early\n";

# call do_interrupt_x86_hardirq: e8, and how far it is from the next instruction.
my @calls = grep { substr( $code, $_, 1 ) eq "\xe8" && $start + $_ + 5 + unpack( 'l<', substr( $code, $_ + 1, 4 ) ) == $deliver->[0] } 0 .. $size - 5;
die 'mend-qemu: ' . @calls . " calls instead of one\n" unless @calls == 1;

# Shortly before it, mov %esi,disp32(register) with a negative distance: the vector, which is the call's second argument, into CPUState, which
# lies before the registers of x86.
my ($from) = sort { $b <=> $a } 0, $calls[0] - 64;
my @stores = grep { substr( $code, $_, 2 ) =~ /^\x89[\xb0-\xb3\xb5-\xb7]$/s && unpack( 'l<', substr( $code, $_ + 2, 4 ) ) < 0 } $from .. $calls[0] - 6;
die 'mend-qemu: ' . @stores . " stores instead of one\n" unless @stores == 1;

seek( $file, $start + $shift + $stores[0], 0 ) or die "mend-qemu: $program: $!\n";
print $file "\x66\x0f\x1f\x44\x00\x00";
close($file) or die "mend-qemu: $program: $!\n";
