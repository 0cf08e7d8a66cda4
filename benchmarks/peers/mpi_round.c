/* MPI_Allreduce of float32, ROUNDS times: mpirun -n N mpi_round MEGABYTES ROUNDS
 * Prints the seconds of each round as JSON: from a barrier until the last process has the sum. One before warms up. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    int count = (int)(atof(argv[1]) * 250000), rounds = atoi(argv[2]);
    float *gradient = malloc(sizeof(float) * (size_t)count);
    if (rank == 0) printf("[");
    for (int r = 0; r <= rounds; r++) {
        for (int i = 0; i < count; i++) gradient[i] = 1.0f;
        MPI_Barrier(MPI_COMM_WORLD);
        double began = MPI_Wtime(), seconds, slowest;
        MPI_Allreduce(MPI_IN_PLACE, gradient, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
        seconds = MPI_Wtime() - began;
        if (gradient[0] != size || gradient[count - 1] != size) MPI_Abort(MPI_COMM_WORLD, 1);
        MPI_Reduce(&seconds, &slowest, 1, MPI_DOUBLE, MPI_MAX, 0, MPI_COMM_WORLD);
        if (rank == 0 && r > 0) printf("%s%.9f", r > 1 ? ", " : "", slowest);
    }
    if (rank == 0) printf("]\n");
    MPI_Finalize();
    return 0;
}
